"""Quality against what is saved: a model pruned in several ways, each measured on held-out text."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from pliant.errors import InvalidInput, UnsupportedModel
from pliant.structure.calibration import Batch, perplexity
from pliant.structure.config import Part, PruneConfig, PruneScore
from pliant.structure.pruning.costs import Costs, latency_of, rounded, saved_parameters
from pliant.structure.pruning.prune import Report, prune

FRACTIONS = (0.5, 1.0)
"""Of the shares that go, or of a budget, at which a way of pruning is measured."""
NEARLY = 0.15
"""Shares this close count as the same point of a curve."""
CONTROLS: tuple[PruneScore, ...] = ("random", "magnitude")


@dataclass(frozen=True)
class Point:
    """One way of pruning, and what it comes to."""

    config: PruneConfig
    saved: float
    """The share of the cost that it saves."""
    perplexity: float
    removed: dict[Part, float]
    """The share of each part that really goes, for units are whole: a sixth of four layers is one
    of them."""

    def __str__(self) -> str:
        return self.config.label(self.removed)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Trials:
    """Prunes a model in one way after another, and measures each once."""

    def __init__(
        self,
        model: nn.Module,
        fitted: Sequence[Batch],
        held_out: Sequence[Batch],
        costs: Costs,
        report: Report | None = None,
        layer_order: Sequence[int] = (),
    ) -> None:
        self.model, self.fitted, self.held_out, self.costs = model, fitted, held_out, costs
        self.report: Report = report or (lambda what, done, total: None)
        self.whole = perplexity(model, held_out)
        if not math.isfinite(self.whole):
            raise UnsupportedModel(
                f"the whole model's perplexity is {self.whole}: its weights are damaged, or need "
                "another dtype"
            )
        self.points: dict[PruneConfig, Point] = {}
        self.latencies: dict[tuple[tuple[Part, float], ...], float] = {}
        self.layer_order: tuple[int, ...] = tuple(layer_order)
        """In which layers go by the score "error", as far as it was found out."""

    def measure(self, config: PruneConfig) -> Point:
        """Prune, measure, and restore the model."""
        if config not in self.points:
            removed = rounded(self.model, shares_of(config))
            what = f"way {len(self.points) + 1}, {config.label(removed)}"
            pruned = prune(
                self.model,
                self.fitted,
                config,
                layer_order=self.layer_order if config.score == "error" else (),
                report=lambda _, *done: self.report(what, *done),
            )
            layers = tuple(map(int, pruned.removed.get("layers", ())))
            if config.score == "error":
                self.layer_order = max(self.layer_order, layers, key=len)
            try:
                measured = perplexity(self.model, self.held_out)
            finally:
                pruned.detach()
            saved = self.saved(shares_of(config), layers)
            self.points[config] = Point(config, saved, measured, removed)
        return self.points[config]

    def curve(self, config: PruneConfig, controls: Sequence[PruneScore] = CONTROLS) -> None:
        """Measure fractions of the shares that go, and beside each the simple ways to choose."""
        for fraction in FRACTIONS:
            part = self._fraction(config, fraction)
            for own in (part, *(replace(part, score=s, compensate=False) for s in controls)):
                try:
                    self.measure(own)
                except InvalidInput:  # half of the shares may be less than a unit
                    if fraction == 1:
                        raise

    def _fraction(self, config: PruneConfig, fraction: float) -> PruneConfig:
        """The same with smaller shares, or what is nearly that and measured already."""
        smaller = {part: share * fraction for part, share in shares_of(config).items()}
        part = replace(config, **smaller)  # type: ignore[arg-type]
        return self.alike(part) or part

    def alike(self, config: PruneConfig) -> PruneConfig | None:
        """What is nearly the same and measured already."""
        for own in self.points:
            if own.parts == config.parts and own.score == config.score:
                shares = [(own.share(part), share) for part, share in shares_of(config).items()]
                if all(abs(measured - share) <= NEARLY * share for measured, share in shares):
                    return own
        return None

    def saved(self, shares: Mapping[Part, float], layers: Collection[int] = ()) -> float:
        """The share of the cost; of parameters exactly, if it is known which layers go. A latency
        is measured once."""
        if self.costs.of == "parameters" and layers:
            with suppress(UnsupportedModel):  # such layers have no stock form
                return saved_parameters(self.model, shares, layers)
        if self.costs.of != "latency":
            return float(self.costs.saved(rounded(self.model, shares)))
        key = tuple(sorted(item for item in shares.items() if item[1]))
        if key not in self.latencies:
            self.latencies[key] = latency_of(self.model, shares)
        return 1 - self.latencies[key]


def shares_of(config: PruneConfig) -> dict[Part, float]:
    return {part: config.share(part) for part in config.parts}
