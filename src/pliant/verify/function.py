"""The verifier that is somebody's Python function."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from pliant.errors import InvalidInput, did_you_mean


@dataclass(frozen=True)
class Function:
    """A Python function decides: `package.module:function` or `path/file.py:function`.

    It gets the answer, the reference and, if it has a third parameter, the prompt.
    """

    name: ClassVar[str] = "function"
    function: str | Callable[..., float]
    _function: Callable[..., float] = field(init=False, repr=False, compare=False)
    _takes_prompt: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        function = _import(self.function) if isinstance(self.function, str) else self.function
        object.__setattr__(self, "_function", function)
        object.__setattr__(self, "_takes_prompt", _accepts(function, 3))

    def __call__(self, answer: str, reference: Any, prompt: str | None = None) -> float:
        arguments = (answer, reference, prompt) if self._takes_prompt else (answer, reference)
        try:
            right = float(self._function(*arguments))
        except Exception as error:  # a user's function may raise anything
            raise InvalidInput(f"{self._label}: {type(error).__name__}: {error}") from error
        if not 0 <= right <= 1:
            raise InvalidInput(f"{self._label}: returned {right}, which is not in [0, 1]")
        return right

    @property
    def _label(self) -> str:
        return self.function if isinstance(self.function, str) else self.function.__name__


def _import(name: str) -> Callable[..., float]:
    place, _, function = name.rpartition(":")
    if not place or not function:
        raise InvalidInput(f"function={name!r}: give package.module:function or file.py:function")
    try:
        module = (
            _from_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
        )
    except Exception as error:  # importing a user's file may raise anything
        raise InvalidInput(f"{place}: cannot be imported ({error})") from error
    imported = getattr(module, function, None)
    if not callable(imported):
        known = [x for x in vars(module) if callable(vars(module)[x]) and not x.startswith("_")]
        raise InvalidInput(f"{place} has no function {function!r}{did_you_mean(function, known)}")
    checked: Callable[..., float] = imported
    return checked


def _from_file(path: Path) -> Any:
    if not path.expanduser().is_file():
        raise FileNotFoundError("there is no such file")
    name = f"pliant_verifier_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path.expanduser())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its dataclasses look up their module
    spec.loader.exec_module(module)
    return module


def _accepts(function: Callable[..., float], n: int) -> bool:
    """Whether it can be called with n arguments; False if its signature is unknown."""
    try:
        inspect.signature(function).bind(*range(n))
    except (TypeError, ValueError):
        return False
    return True
