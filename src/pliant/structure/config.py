"""The settings of gates: which kinds of units they scale, and under which names."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal, get_args

from pliant.errors import InvalidInput, check_choice

Kind = Literal["heads", "channels", "experts", "layers", "attention", "mlp"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class GateConfig:
    """One number for each unit of the chosen kinds, in every pattern."""

    units: tuple[Kind, ...] = ("heads",)
    """What is gated: attention "heads", MLP "channels", "experts" of a mixture, whole "layers", or
    the "attention" or "mlp" half of each layer."""
    patterns: tuple[str, ...] = ("default",)
    """Sets of gates to switch between; the first is active after attaching."""

    def __post_init__(self) -> None:
        for field in ("units", "patterns"):
            value = getattr(self, field)
            value = (value,) if isinstance(value, str) else tuple(value)
            object.__setattr__(self, field, value)
            name, times = Counter(value).most_common(1)[0] if value else ("nothing", 2)
            if times > 1:
                raise InvalidInput(f"{field} = {value!r}: give different names; {name!r} repeats")
        for kind in self.units:
            check_choice("units", kind, KINDS)
        for name in self.patterns:
            check_pattern_name(name)


def check_pattern_name(name: str) -> None:
    if not isinstance(name, str) or not name.isidentifier():
        raise InvalidInput(f"{name!r} cannot name a pattern: use letters, digits and '_'")
