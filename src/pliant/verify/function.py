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
    """A Python function says: `package.module:function` or `path/file.py:function`.

    It is called with the answer, the reference and, if it takes three, the prompt.
    """

    name: ClassVar[str] = "function"
    function: str | Callable[..., float]
    _called: Callable[..., float] = field(init=False, repr=False, compare=False)
    _asks_prompt: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        found = _imported(self.function) if isinstance(self.function, str) else self.function
        object.__setattr__(self, "_called", found)
        object.__setattr__(self, "_asks_prompt", _takes(found, 3))

    def __call__(self, answer: str, reference: Any, prompt: str | None = None) -> float:
        given = (answer, reference, prompt) if self._asks_prompt else (answer, reference)
        try:
            found = float(self._called(*given))
        except Exception as error:  # whatever it raises, it was this function
            raise InvalidInput(f"{self._label}: {type(error).__name__}: {error}") from error
        if not 0 <= found <= 1:
            raise InvalidInput(f"{self._label}: returned {found}, and a number in [0, 1] is due")
        return found

    @property
    def _label(self) -> str:
        return self.function if isinstance(self.function, str) else self.function.__name__


def _imported(name: str) -> Callable[..., float]:
    place, _, function = name.rpartition(":")
    if not place or not function:
        raise InvalidInput(f"function={name!r}: package.module:function or file.py:function is due")
    try:
        module = (
            _from_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
        )
    except Exception as error:  # whatever importing it raises
        raise InvalidInput(f"{place}: cannot be imported ({error})") from error
    found = getattr(module, function, None)
    if not callable(found):
        known = [x for x in vars(module) if callable(vars(module)[x]) and not x.startswith("_")]
        raise InvalidInput(f"{place} has no function {function!r}{did_you_mean(function, known)}")
    checked: Callable[..., float] = found
    return checked


def _from_file(path: Path) -> Any:
    if not path.expanduser().is_file():
        raise FileNotFoundError("there is no such file")
    name = f"pliant_verifier_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path.expanduser())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses in it look their module up
    spec.loader.exec_module(module)
    return module


def _takes(function: Callable[..., float], n: int) -> bool:
    """Whether it can be called with n arguments; where it does not tell, as if it could not."""
    try:
        inspect.signature(function).bind(*range(n))
    except (TypeError, ValueError):
        return False
    return True
