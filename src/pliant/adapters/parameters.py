"""A fourth kind of hook: a parameter is changed for as long as a module's forward runs.

A hook sees what goes into a module and what comes out. What a forward makes of a bare parameter it
can only change by changing the parameter, and that must be neither edited nor replaced: other
threads, optimizers and `state_dict` see it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pliant.adapters.hooks import Guarded, Patch
from pliant.errors import AdapterError

VALUES = "_pliant_values"
"""The attribute of a module that holds what its parameters are in each thread."""


@dataclass(frozen=True, eq=False)
class Within:
    """Inside `caller.forward`, `holder.<parameter>` is `act(parameter)`."""

    caller: nn.Module
    holder: nn.Module
    parameter: str
    act: Callable[[Tensor], Tensor]

    def connect(self, adapter: nn.Module) -> Reading:
        return Reading(self, adapter)


class Reading:
    """The change that is set: the holder reads the parameter's value in this thread, if any."""

    def __init__(self, wire: Within, adapter: nn.Module) -> None:
        self.holder, self.parameter, self.act = wire.holder, wire.parameter, wire.act
        _make_reader(self.holder, self.parameter)
        self.reader = type(self.holder)
        self.patch = Patch(wire.caller, Guarded(adapter, self._run))

    def _run(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if type(self.holder) is not self.reader:
            raise AdapterError(
                f"{type(self.holder).__name__}.{self.parameter} has been parametrized since the "
                "adapter was attached, so what the adapter does to it would be lost: detach the "
                "adapter, and attach it again when no parametrization is left"
            )
        values = vars(self.holder)[VALUES]
        outer = values.current
        values.current = {**outer, self.parameter: self.act(getattr(self.holder, self.parameter))}
        try:
            return forward(*args, **kwargs)
        finally:
            values.current = outer

    def remove(self) -> None:
        self.patch.remove()
        _restore(self.holder)


class Values(threading.local):
    """The values of a module's parameters in this thread, and the adapters that set them."""

    def __init__(self) -> None:
        self.current: dict[str, Tensor] = {}  # an instance attribute, so that dynamo guards it

    def __reduce__(self) -> Any:
        return Values, ()


_READERS: dict[tuple[type[nn.Module], str], type[nn.Module]] = {}
_USERS = "_pliant_readings"


def _make_reader(holder: nn.Module, parameter: str) -> None:
    """Give the module the class that reads the parameter's value; the same for all adapters."""
    state = vars(holder)
    if _USERS in state:
        assert parameter in vars(type(holder)), "one parameter of a module is enough so far"
        state[_USERS] += 1
        return
    own = type(holder)
    if (own, parameter) not in _READERS:
        names = {"__module__": own.__module__, "__qualname__": own.__qualname__}
        names["__doc__"] = own.__doc__ or ""
        _READERS[own, parameter] = type(
            own.__name__, (own,), {**names, parameter: property(_reader(parameter))}
        )
    state[VALUES], state[_USERS] = Values(), 1
    holder.__class__ = _READERS[own, parameter]


def _reader(parameter: str) -> Callable[[Any], Any]:
    def read(self: Any) -> Any:
        value = self.__dict__[VALUES].current.get(parameter)
        return nn.Module.__getattr__(self, parameter) if value is None else value

    return read


def _restore(holder: nn.Module) -> None:
    state = vars(holder)
    state[_USERS] -= 1
    if not state[_USERS]:
        del state[_USERS], state[VALUES]
        holder.__class__ = type(holder).__mro__[1]
