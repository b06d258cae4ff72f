"""Replace a module's computation for the length of a block, in the calling thread alone.

A forward hook cannot skip the module's computation, and patching `forward` would affect every
thread. An interceptor replaces one method of one module and looks up a handler in the calling
context; without one, it calls the module's own method.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

Handler = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""`handler(original, args, kwargs)` returns the output; `original` is the module's own method."""

FORWARD = "forward"
"""Intercepts the module's computation; its forward hooks still run around the handler."""

CALL = "_compiled_call_impl"
"""Intercepts the call, hooks included: torch calls this slot first, and does not pickle it."""

Target = tuple[nn.Module, str]
_handlers: ContextVar[Mapping[Target, Handler]] = ContextVar("pliant_handlers")
_lock = threading.Lock()


@contextmanager
def intercept(handlers: Mapping[Target, Handler]) -> Iterator[None]:
    """Call `handlers` in place of their targets inside the block, in this context alone."""
    targets = list(handlers)
    _install(targets)
    token = _handlers.set(handlers)
    try:
        yield
    finally:
        _handlers.reset(token)
        _uninstall(targets)


class _Interceptor:
    """Replaces one module's method; shared by all threads that intercept it."""

    def __init__(self, target: Target) -> None:
        module, self.method = target
        self.target = target
        self.before = vars(module).get(self.method)
        self.users = 0

    @torch.compiler.disable  # the handler depends on the context, which the compiler cannot guard
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        handler = _handlers.get({}).get(self.target)
        if handler is None:
            return self.original(*args, **kwargs)
        return handler(self.original, args, kwargs)

    @property
    def original(self) -> Callable[..., Any]:
        if self.before is not None:
            return self.before
        module = self.target[0]
        return module._call_impl if self.method == CALL else type(module).forward.__get__(module)

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """Gives it the signature of the original: `generate` inspects that of `forward`."""
        return self.original


def _install(targets: list[Target]) -> None:
    with _lock:
        for target in targets:
            module, method = target
            interceptor = vars(module).get(method)
            if not isinstance(interceptor, _Interceptor):
                interceptor = _Interceptor(target)
                setattr(module, method, interceptor)
            interceptor.users += 1


def _uninstall(targets: list[Target]) -> None:
    with _lock:
        for module, method in targets:
            interceptor = vars(module).get(method)
            if not isinstance(interceptor, _Interceptor):
                continue  # others have wrapped it meanwhile: it stays, and calls the original
            interceptor.users -= 1
            if interceptor.users:
                continue
            if interceptor.before is None:
                delattr(module, method)
            else:
                setattr(module, method, interceptor.before)
