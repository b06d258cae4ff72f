"""The settings of gates, of pruning and of agency."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from pliant.errors import InvalidInput, check_choice, check_whole, named_settings

Kind = Literal[
    "heads",
    "channels",
    "experts",
    "layers",
    "attention",
    "mlp",
    "expert_channels",
    "recurrent_heads",
]
KINDS: tuple[Kind, ...] = get_args(Kind)
Part = Literal["experts", "heads", "channels", "layers"]
"""Kinds of units that a smaller stock model can be without."""
PARTS: tuple[Part, ...] = get_args(Part)
PruneScore = Literal[
    "error", "fisher", "taylor", "leave_one_out", "entropy", "activation", "magnitude", "random"
]


@named_settings
@dataclass(frozen=True)
class GateConfig:
    """One number for each unit of the chosen kinds, in every pattern."""

    units: tuple[Kind, ...] = ("heads",)
    """What is gated: attention "heads", MLP "channels", "experts" of a mixture, whole "layers",
    the "attention" or "mlp" half of each layer, the "expert_channels" of a mixture (those of expert
    0, then those of expert 1, ...) or the "recurrent_heads" of Mamba and linear attention."""
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


@named_settings
@dataclass(frozen=True)
class PruneConfig:
    """How much of each part goes."""

    heads: float = 0.0
    """The share of attention heads, in groups that share a KV head."""
    channels: float = 0.0
    """The share of the MLP's channels."""
    experts: float = 0.0
    """The share of a mixture's experts."""
    layers: float = 0.0
    """The share of whole layers."""
    score: PruneScore = "error"
    """Which units go first: those whose loss the others can best make up for ("error"), those with
    the lowest `importance` by another score, or any ("random")."""
    compensate: bool = True
    """Give the projections new weights; without, the others stay as they are."""
    uniform: bool = True
    """Every layer loses the same share of its heads and channels, as nearly every stock config
    needs. False: layers in which that costs less lose more. Experts are always uniform."""
    damping: float = 0.01
    """How strongly the new weights are drawn to the old ones, relative to the features."""
    seed: int = 0
    """Of the score "random"."""

    def __post_init__(self) -> None:
        for part in PARTS:
            share = getattr(self, part)
            if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share < 1:
                raise InvalidInput(f"{part} = {share!r}: give a share from 0 to below 1")
        check_choice("score", self.score, get_args(PruneScore))
        check_whole("seed", self.seed, least=0)
        if not self.parts:
            raise InvalidInput(f"nothing to prune: give a share of {', '.join(PARTS)}")
        if not self.damping > 0:
            raise InvalidInput(f"damping = {self.damping!r}: give a number above 0")

    @property
    def needs_text(self) -> bool:
        """Whether the choice of units or the new weights depend on the calibration text."""
        return self.compensate or self.score not in ("magnitude", "random")

    @property
    def parts(self) -> tuple[Part, ...]:
        """Those that lose units, in the order in which they are pruned."""
        return tuple(part for part in PARTS if getattr(self, part))

    def share(self, kind: str) -> float:
        """The share of units of this kind that go; 0 of kinds that are no part."""
        return float(getattr(self, kind)) if kind in PARTS else 0.0

    def label(self, removed: Mapping[Part, float] | None = None) -> str:
        """This way of pruning in words, with the shares that are really `removed`, if known."""
        each = {part: (removed or {}).get(part, self.share(part)) for part in self.parts}
        shares = " and ".join(f"{share:.0%} of {part}" for part, share in each.items())
        how = "compensated" if self.compensate else "not compensated"
        uneven = "" if self.uniform else ", another share of each layer"
        return f"{shares} by {self.score}{uneven}, {how}"

    def __str__(self) -> str:
        return self.label()


@named_settings
@dataclass(frozen=True)
class AgencyConfig:
    """When a head's state changes; the states themselves are in `pliant.structure.agency`."""

    gates: str = "structure"
    """The name under which the gates are attached whose heads have states."""
    momentum: float = 0.9
    """Of the running averages: this share of the old value, the rest of the new one."""
    overload: float = 0.85
    """An active head whose utilisation is above this becomes overloaded."""
    recovery: int = 100
    """After this many observations an overloaded head becomes active again."""
    misalignment: float = 0.6
    """A head becomes misaligned when the loss's derivative with respect to its gate, on average, is
    above this share of the root mean square of these derivatives in its layer."""
    derivative_momentum: float = 0.97
    """As `momentum`, for the derivatives, whose signs change from batch to batch.
    (benchmarks/structure_agency.py: no head of two sound models crosses the threshold by chance,
    each of four heads with negated weights does.)"""
    warmup: int = 20
    """Observations before the first head can become misaligned: averages of few are noise."""
    violation: float = 0.5
    """A locked head whose gate is raised above this by others has been written to."""

    def __post_init__(self) -> None:
        for field in ("momentum", "derivative_momentum"):
            value = getattr(self, field)
            if not 0 <= value < 1:
                raise InvalidInput(f"{field} = {value!r}: give a number in [0, 1)")
        for field in ("overload", "misalignment", "violation"):
            value = getattr(self, field)
            if not 0 <= value < float("inf"):
                raise InvalidInput(f"{field} = {value!r}: give a number, 0 or more")
        check_whole("recovery", self.recovery, 1)
        check_whole("warmup", self.warmup, 1)
