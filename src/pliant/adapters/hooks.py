"""The three kinds of hooks of an adapter: before a module, after it, or around it.

`Adapter.wire` yields them. Their functions must be bound methods, or `functools.partial`s of them,
not closures: then the hooks of a deep copy of a model call the adapter's copy.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn
from torch.utils.hooks import RemovableHandle


@dataclass(frozen=True, eq=False)
class Before:
    """`act(module, args, kwargs)` returns the module's new (args, kwargs), or None."""

    module: nn.Module
    act: Callable[..., Any]

    def connect(self, adapter: nn.Module) -> RemovableHandle:
        hook = Guarded(adapter, self.act)
        return self.module.register_forward_pre_hook(hook, with_kwargs=True)


@dataclass(frozen=True, eq=False)
class After:
    """`act(module, args, kwargs, output)` returns the module's new output, or None."""

    module: nn.Module
    act: Callable[..., Any]

    def connect(self, adapter: nn.Module) -> RemovableHandle:
        return self.module.register_forward_hook(Guarded(adapter, self.act), with_kwargs=True)


@dataclass(frozen=True, eq=False)
class Around:
    """`act(forward, *args, **kwargs)` replaces the module's `forward`, which it may call."""

    module: nn.Module
    act: Callable[..., Any]

    def connect(self, adapter: nn.Module) -> Patch:
        return Patch(self.module, Guarded(adapter, self.act))


class Connection(Protocol):
    """A hook that is set: `remove` takes it off."""

    def remove(self) -> None: ...


class Wire(Protocol):
    """One of the three, or any other change of the model while an adapter is attached."""

    def connect(self, adapter: nn.Module) -> Connection: ...


class Switch(threading.local):
    """The adapters that are off in this thread. (torch.compile cannot trace a ContextVar.)"""

    def __init__(self) -> None:
        self.off: tuple[nn.Module, ...] = ()  # an instance attribute, so that dynamo guards it


SWITCH = Switch()


def is_off(adapter: nn.Module) -> bool:
    return any(adapter is off for off in SWITCH.off)


def switch_off(adapter: nn.Module) -> None:
    SWITCH.off = (*SWITCH.off, adapter)


def switch_on(adapter: nn.Module) -> None:
    """Undo one `switch_off` of this adapter; its other calls stay in effect."""
    for i, off in enumerate(SWITCH.off):
        if off is adapter:
            SWITCH.off = SWITCH.off[:i] + SWITCH.off[i + 1 :]
            return


class Guarded:
    """A hook's function, which does nothing while its adapter is off in this thread."""

    def __init__(self, adapter: nn.Module, act: Callable[..., Any]) -> None:
        self.adapter = adapter
        self.act = act

    def __call__(self, *args: Any) -> Any:
        return None if is_off(self.adapter) else self.act(*args)


class Patch:
    """Replaces `module.forward`, with its signature; others may patch before and after it."""

    def __init__(self, module: nn.Module, guarded: Guarded) -> None:
        self.module = module
        self.guarded: Guarded | None = guarded
        self.was_patched = "forward" in vars(module)
        self.__wrapped__ = module.forward  # inspect.signature follows this name
        module.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args and args[0] is self.module:  # accelerate binds it again when it unwraps
            args = args[1:]
        if self.guarded is None or is_off(self.guarded.adapter):
            return self.__wrapped__(*args, **kwargs)
        return self.guarded.act(self.__wrapped__, *args, **kwargs)

    def remove(self) -> None:
        """Take this patch off; inside a foreign patch, it becomes transparent instead."""
        outer = vars(self.module).get("forward")
        if outer is self:
            if self.was_patched:
                self.module.forward = self.__wrapped__
            else:
                del self.module.forward
            return
        while isinstance(outer, Patch):
            if outer.__wrapped__ is self:
                outer.__wrapped__, outer.was_patched = self.__wrapped__, self.was_patched
                return
            outer = outer.__wrapped__
        self.guarded = None
