"""The settings of a cycle of plasticity, and of sleep."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from pliant.errors import InvalidInput, check_choice, check_whole, named_settings
from pliant.structure.config import check_pattern_name
from pliant.structure.ranking.importance import ImportanceConfig
from pliant.structure.ranking.measures import Score

Growth = Literal["gradient", "entropy_gap", "balanced", "random"]


@named_settings
@dataclass(frozen=True)
class PlasticityConfig:
    """How many heads are closed, how many of them grow again, and when."""

    prune: float = 0.5
    """The share of all heads that is closed when a cycle has pruned."""
    regrow: float = 0.05
    """The share of all heads that each cycle opens again; 0 is the control without regrowth."""
    growth: Growth = "entropy_gap"
    """Which of the closed heads come first: those that attend to the fewest positions; those whose
    gate's gradient promises the largest decrease of the loss ("gradient"); the best by gradient of
    the layer that has the fewest open heads ("balanced"); or any. (The default ended best on both
    models of benchmarks/structure_regrowth.py.)"""
    score: Score = "fisher"
    """By which importance heads are closed, the lowest first."""
    cycles: int = 1
    """How often to prune, adapt, regrow and learn."""
    adapt: int = 100
    """Steps of training between pruning and regrowth."""
    learn: int = 100
    """Steps of training after regrowth."""
    warmup: int = 20
    """Steps over which the gate of a regrown head opens."""
    sleep: float = 0.0
    """Before each pruning, of two open heads of a layer that write nearly the same (a cosine above
    this) one is closed, and the gate of the other grows; 0: none is. They count among the heads
    that are to be closed."""
    rate: float = 1.0
    """The learning rate of regrown heads, relative to that of everything else."""
    seed: int = 0
    """Of "random", for pruning and for growth."""
    gates: str = "structure"
    """The name under which the gates are attached."""
    pattern: str = "default"
    """The pattern of gates that the cycle sets."""

    def __post_init__(self) -> None:
        for name in ("prune", "regrow"):
            share = getattr(self, name)
            if not _is_number(share) or not 0 <= share < 1:
                raise InvalidInput(f"{name} = {share!r}: give a share from 0 to below 1")
        if not _is_number(self.sleep) or not 0 <= self.sleep <= 1:
            raise InvalidInput(f"sleep = {self.sleep!r}: give a cosine, as 0.85, or 0 for no sleep")
        check_choice("growth", self.growth, get_args(Growth))
        ImportanceConfig(("heads",), self.score)  # refuses scores that rank no heads
        for name in ("cycles", "adapt", "learn", "warmup"):
            check_whole(name, getattr(self, name), 1)
        check_whole("seed", self.seed, 0)
        if self.warmup > self.learn:
            raise InvalidInput(
                f"warmup = {self.warmup}: regrown heads open within the {self.learn} steps of "
                f"`learn`: give {self.learn} or less"
            )
        if not _is_number(self.rate) or not 0 < self.rate < math.inf:
            raise InvalidInput(f"rate = {self.rate!r}: give a positive number")
        check_pattern_name(self.pattern)

    @property
    def steps(self) -> int:
        """Of training, in all cycles."""
        return self.cycles * (self.adapt + self.learn)


@named_settings
@dataclass(frozen=True)
class SleepConfig:
    """Which heads are merged or dropped, and what takes over."""

    similarity: float = 0.85
    """Two heads of a layer are merged if the cosine of what they write is above this."""
    negligible: float = 0.1
    """A head is dropped if what it writes is smaller than this, relative to the root mean square
    of the layer's heads."""
    take_over: Literal["weights", "gate"] = "weights"
    """"weights": the layer's other heads get new output weights, by least squares. "gate": the
    gate of the other head of a pair grows, and nothing takes over from dropped heads."""
    damping: float = 0.01
    """How strongly the new weights are drawn to those that a merger by gates would give."""

    def __post_init__(self) -> None:
        if not _is_number(self.similarity) or not 0 < self.similarity <= 1:
            raise InvalidInput(f"similarity = {self.similarity!r}: give a cosine in (0, 1]")
        if not _is_number(self.negligible) or not 0 <= self.negligible < 1:
            raise InvalidInput(f"negligible = {self.negligible!r}: give a share from 0 to below 1")
        check_choice("take_over", self.take_over, ("weights", "gate"))
        if not _is_number(self.damping) or not 0 < self.damping < math.inf:
            raise InvalidInput(f"damping = {self.damping!r}: give a positive number")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
