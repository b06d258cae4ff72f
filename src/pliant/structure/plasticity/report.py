"""What each phase of a cycle did to the loss, and what regrowth is worth beside a control."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Any, Literal

from pliant.errors import InvalidInput
from pliant.stats import Band, bootstrap
from pliant.structure.plasticity.config import PlasticityConfig

Phase = Literal["before", "slept", "pruned", "adapted", "regrown", "learned"]


@dataclass(frozen=True)
class PhaseRow:
    """The model at the end of a phase."""

    cycle: int
    """From 1 on."""
    phase: Phase
    step: int
    """Steps of training so far."""
    loss: float
    """Of the held-out text."""
    open: int
    """Heads with a gate that is not 0, or that has begun to open."""


@dataclass(frozen=True)
class PlasticityResult:
    """What a run of plasticity came to."""

    config: PlasticityConfig
    heads: int
    rows: tuple[PhaseRow, ...]
    regrown: tuple[tuple[str, int], ...]
    """The heads that grew again, as (site, number), in this order."""
    merged: tuple[tuple[str, int, int], ...] = ()
    """The heads that a sleep closed, as (site, number, the one they were merged into)."""

    @property
    def loss(self) -> float:
        """The held-out loss at the end."""
        return self.rows[-1].loss

    def at(self, phase: Phase, cycle: int = 1) -> PhaseRow:
        for row in self.rows:
            if (row.cycle, row.phase) == (cycle, phase):
                return row
        raise InvalidInput(f"there is no phase {phase!r} in cycle {cycle}")

    def cells(self) -> list[list[str]]:
        """The rows of a table: cycle, phase, steps, held-out loss, open heads."""
        return [
            [f"{row.cycle}", row.phase, f"{row.step:,}", f"{row.loss:.4f}", f"{row.open}"]
            for row in self.rows
        ]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        first, last = self.rows[0], self.rows[-1]
        how = f" ({self.config.growth})" if self.regrown else ""
        losses = f"{first.loss:.4f}"
        pruned = next((row for row in self.rows if row.phase == "pruned"), None)
        if pruned is not None:
            losses += f", {pruned.loss:.4f} after pruning and {last.loss:.4f} at the end"
        merged = f", {len(self.merged)} were merged into others" if self.merged else ""
        return (
            f"{last.open} of {self.heads} heads are open after {last.step:,} steps, "
            f"{len(self.regrown)} of them regrown{how}{merged}: the held-out loss was {losses}"
        )


@dataclass(frozen=True)
class Regrowth:
    """What regrowth is worth: the same runs with it and without, in pairs."""

    growth: str
    losses: tuple[float, ...]
    controls: tuple[float, ...]
    open: int
    """Heads that are open at the end of the first run; the same of its control below."""
    control_open: int
    difference: Band
    """Of the final held-out loss, with regrowth minus without."""

    @property
    def is_better(self) -> bool:
        """Whether the whole interval is below 0; a single pair shows nothing."""
        return len(self.losses) > 1 and self.difference.high < 0

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "difference": self.difference.as_dict(), "better": self.is_better}

    def __str__(self) -> str:
        ends = (
            f"{mean(self.losses):.4f} with regrowth ({self.growth}; {self.open} heads open) and "
            f"{mean(self.controls):.4f} without ({self.control_open})"
        )
        verdict = "is better" if self.is_better else "is not shown to be better"
        if len(self.losses) > 1 and self.difference.low > 0:
            verdict = "is worse"
        interval = f", a difference of {self.difference}" if len(self.losses) > 1 else ""
        pairs = "1 pair of runs" if len(self.losses) == 1 else f"{len(self.losses)} pairs of runs"
        return f"Regrowth {verdict}: a held-out loss of {ends}{interval}, in {pairs}"


def compare_regrowth(
    results: Sequence[PlasticityResult], controls: Sequence[PlasticityResult]
) -> Regrowth:
    """The runs with regrowth beside their controls, pair by pair (the same seed, say)."""
    if len(results) != len(controls) or not results:
        raise InvalidInput(
            f"{len(results)} results and {len(controls)} controls: give a control for each result"
        )
    for result, control in zip(results, controls, strict=True):
        if result.rows[-1].step != control.rows[-1].step:
            raise InvalidInput(
                f"a result of {result.rows[-1].step} steps and its control of "
                f"{control.rows[-1].step} are no pair: train both for as long"
            )
    losses = tuple(result.loss for result in results)
    without = tuple(control.loss for control in controls)
    differences = [a - b for a, b in zip(losses, without, strict=True)]
    band = bootstrap(lambda rows: mean(differences[i] for i in rows), len(differences))
    opened, control_open = (runs[0].rows[-1].open for runs in (results, controls))
    return Regrowth(results[0].config.growth, losses, without, opened, control_open, band)
