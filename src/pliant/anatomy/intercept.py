"""Answer for a module, in this thread and for a while: who calls it from elsewhere notices nothing.

A hook can change what a module returns but cannot spare it the work, and a patched `forward` would
be patched for every thread. A interceptor stands in front of one method of one module and asks the
calling context who answers: a handler laid down here, or (for everybody else) the module itself.
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
"""Takes what the module would have done, and the call's arguments; returns what the caller gets."""

FORWARD = "forward"
"""The module's own computation; its forward hooks still run around whatever the handler returns."""

CALL = "_compiled_call_impl"
"""The whole call, hooks included: torch asks this slot first, and pickles modules without it."""

Target = tuple[nn.Module, str]
_handlers: ContextVar[Mapping[Target, Handler]] = ContextVar("pliant_detours")
_lock = threading.Lock()


@contextmanager
def intercept(handlers: Mapping[Target, Handler]) -> Iterator[None]:
    """Let `handlers` answer for their modules while the block runs, in this context alone."""
    targets = list(handlers)
    _put_up(targets)
    token = _handlers.set(handlers)
    try:
        yield
    finally:
        _handlers.reset(token)
        _take_down(targets)


class _Interceptor:
    """One module's method, with a question in front of it; shared by all threads that need it."""

    def __init__(self, target: Target) -> None:
        module, self.method = target
        self.target = target
        self.before = vars(module).get(self.method)
        self.users = 0

    @torch.compiler.disable  # who answers depends on the context, which no compiler guards
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
        """So that it has the signature of what it stands for: `generate` looks at a forward's."""
        return self.original


def _put_up(targets: list[Target]) -> None:
    with _lock:
        for target in targets:
            module, method = target
            interceptor = vars(module).get(method)
            if not isinstance(interceptor, _Interceptor):
                interceptor = _Interceptor(target)
                setattr(module, method, interceptor)
            interceptor.users += 1


def _take_down(targets: list[Target]) -> None:
    with _lock:
        for module, method in targets:
            interceptor = vars(module).get(method)
            if not isinstance(interceptor, _Interceptor):
                continue  # wrapped by somebody meanwhile: it stays, and lets every call through
            interceptor.users -= 1
            if interceptor.users:
                continue
            if interceptor.before is None:
                delattr(module, method)
            else:
                setattr(module, method, interceptor.before)
