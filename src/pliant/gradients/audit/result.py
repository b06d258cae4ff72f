"""Which contender won a race, and how certain that is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pliant.gradients.audit.contenders import STANDARD, Contender
from pliant.stats import Band, as_json, bootstrap

Floats = NDArray[np.float64]
FEWEST_STEPS = 10
"""A training of a few steps shows nothing of where it would lead."""

Curve = Sequence[tuple[float, float]]
"""(share of the budget that is spent, loss on the held-out rows)"""


@dataclass(frozen=True, eq=False)
class Run:
    """One contender's training, with all its seeds."""

    contender: Contender
    steps: int
    """That the budget bought."""
    seconds_a_step: float
    operations_a_step: float | None
    """As a share of a standard step's."""
    curves: tuple[Curve, ...]
    losses: Floats
    """At the end: (seeds, held-out rows), each row's loss summed over its tokens."""

    @property
    def name(self) -> str:
        return self.contender.name


@dataclass(frozen=True, eq=False)
class Race:
    """All contenders: the configuration under test first, standard training last."""

    runs: tuple[Run, ...]
    counts: NDArray[np.int64]
    """The tokens of each held-out row."""
    seconds: float | None
    steps: int | None
    level: float = 0.95

    def __getitem__(self, name: str) -> Run:
        return next(run for run in self.runs if run.name == name)

    @property
    def standard(self) -> Run:
        return next(run for run in self.runs if run.contender == STANDARD)

    @property
    def seeds(self) -> int:
        return len(self.runs[0].losses)

    def loss(self, run: Run) -> float:
        """At the end, over all held-out tokens and seeds."""
        return float(run.losses.mean(0).sum() / self.counts.sum())

    def gain(self, run: Run) -> Band:
        """The loss below standard training's: above 0 is better.

        Paired, seed by seed and row by row. Its limits are the wider of two: what other seeds would
        give (Student's t) and what other held-out rows would; with so many contenders, each is held
        to a stricter level, so that one of them is found better by chance in 5 races of 100.
        """
        apart = self.standard.losses - run.losses
        level = 1 - (1 - self.level) / max(1, len(self.runs) - 1)
        rows = bootstrap(
            lambda at: float(apart[:, at].mean(0).sum() / self.counts[at].sum()),
            len(self.counts),
            level=level,
        )
        seeds = t_band(apart.sum(1) / self.counts.sum(), level)
        if math.isnan(seeds.low):
            return seeds
        return Band(rows.value, min(rows.low, seeds.low), max(rows.high, seeds.high), level)

    @property
    def is_conclusive(self) -> bool:
        """Whether every contender trained for more than a few steps."""
        return all(run.steps >= FEWEST_STEPS for run in self.runs)

    @property
    def winner(self) -> Run:
        """Standard training, unless another is significantly better: then the best of those."""
        if not self.is_conclusive:
            return self.standard
        others = (run for run in self.runs if run.contender != STANDARD)
        better = [run for run in others if self.gain(run).low > 0]
        return min(better, key=self.loss, default=self.standard)

    @property
    def budget(self) -> str:
        if self.seconds is not None:
            return f"equal time ({self.seconds:g} s each)"
        return f"equal operations (those of {self.steps:,} standard steps)"

    @property
    def sentence(self) -> str:
        """The recommendation."""
        at = f"at {self.budget}, {self.seeds} seed{'s' * (self.seeds != 1)}"
        standard, winner = self.standard, self.winner
        if not self.is_conclusive:
            steps = min(run.steps for run in self.runs)
            return (
                f"Could not tell: {at}, a contender trained for only {steps} "
                f"step{'s' * (steps != 1)}, and {FEWEST_STEPS} are needed. Give the race more "
                f"{'time' if self.seconds is not None else 'steps'}."
            )
        if winner is not standard:
            smaller = winner.contender.kind in ("rows", "hardest_rows")
            how = "Use smaller batches, and" if smaller else "Use"
            how = f"{how} {winner.name}"
            return (
                f"{how}: {at}, it gains {_signed(self.gain(winner))} nats a token on standard "
                f"training's {self.loss(standard):.4f}."
            )
        others = [run for run in self.runs if run is not standard]
        if not others:
            return f"Train as usual: {at}, there was nothing to compare with."
        best = min(others, key=self.loss)
        doubt = "" if self.seeds > 1 else " (one seed proves nothing: use more)"
        return (
            f"Train as usual: {at}, nothing was significantly better than standard training's "
            f"{self.loss(standard):.4f}{doubt}; the next, {best.name}, gains "
            f"{_signed(self.gain(best))} nats a token on it."
        )

    def __str__(self) -> str:
        return self.sentence

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        content = {
            "seconds": self.seconds,
            "steps": self.steps,
            "seeds": self.seeds,
            "sentence": self.sentence,
            "conclusive": self.is_conclusive,
            "winner": self.winner.name,
            "runs": [self._figures(run) for run in self.runs],
        }
        return dict(as_json(content))

    def _figures(self, run: Run) -> dict[str, Any]:
        return {
            "name": run.name,
            "config": run.contender.config,
            "steps": run.steps,
            "seconds_a_step": run.seconds_a_step,
            "operations_a_step": run.operations_a_step,
            "loss": self.loss(run),
            "gain": self.gain(run),
            "curves": run.curves,
        }


def t_band(values: Floats, level: float) -> Band:
    """Of the mean of a few values, drawn alike."""
    from scipy import stats

    n, mean = len(values), float(values.mean())
    if n < 2 or not np.isfinite(values).all():
        return Band(mean, math.nan, math.nan, level)
    half = float(stats.t.ppf((1 + level) / 2, n - 1) * values.std(ddof=1) / math.sqrt(n))
    return Band(mean, mean - half, mean + half, level)


def _signed(band: Band) -> str:
    if math.isnan(band.low):
        return f"{band.value:+.4f}"
    return f"{band.value:+.4f} [{band.low:+.4f}, {band.high:+.4f}]"
