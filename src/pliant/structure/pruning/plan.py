"""Divide one budget over the parts of a model, by what each part alone loses.

    plan = plan_pruning(model, fitted, held_out, PlanConfig(budget=0.25))
    print(plan)                                   # what each way costs in perplexity
    pruned = prune(model, fitted, plan.config)

Each part is pruned alone, by half of the budget and by all of it. That says what mixtures should
lose; the best mixture is then measured too, which corrects what others should lose, and so on until
the same mixture is best again. Whatever lost least is the plan.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from pliant.anatomy import Anatomy
from pliant.errors import (
    InvalidInput,
    UnsupportedModel,
    check_choice,
    check_whole,
    named_settings,
)
from pliant.structure.calibration import Batch
from pliant.structure.config import PARTS, Part, PruneConfig, PruneScore
from pliant.structure.pruning.costs import COSTS, Cost, Costs, costs_of
from pliant.structure.pruning.mixtures import Losses
from pliant.structure.pruning.prune import check_score
from pliant.structure.pruning.trials import (
    CONTROLS,
    FRACTIONS,
    Point,
    Report,
    Trials,
    shares_of,
)
from pliant.structure.units import removed_of, sites_of, units_of

MOST = 0.9
"""The largest share of a part that is tried."""
LEVELS = 40
"""Shares of a part among which mixtures are sought."""
MIXTURES = 3
"""The most that are measured: each corrects what the next one is expected to lose."""
ENOUGH = 0.97
"""Of the budget is saved by what counts as saving it."""
CORRECTIONS = 3


@named_settings
@dataclass(frozen=True)
class PlanConfig:
    """How much is to be saved, of what, and from which parts."""

    budget: float
    """The share to save, above 0 and below 1."""
    of: Cost = "parameters"
    """Of "parameters", "flops" (of a prompt), "kv" (bytes of its keys and values) or "latency"
    (measured, of a prompt and an answer)."""
    parts: tuple[Part, ...] = PARTS
    """What may lose units; a part without a smaller stock form is left out."""
    score: PruneScore = "error"
    """As in `PruneConfig`."""
    compensate: bool = True
    """As in `PruneConfig`."""
    uniform: bool = True
    """As in `PruneConfig`."""
    seed: int = 0
    """As in `PruneConfig`."""

    def __post_init__(self) -> None:
        if isinstance(self.budget, bool) or not 0 < self.budget < 1:
            raise InvalidInput(f"budget = {self.budget!r}: give a share above 0 and below 1")
        check_choice("of", self.of, COSTS)
        check_choice("score", self.score, get_args(PruneScore))
        check_whole("seed", self.seed, least=0)
        if not self.parts:
            raise InvalidInput(f"parts = {self.parts!r}: name one of {', '.join(PARTS)}")
        for part in self.parts:
            check_choice("parts", part, PARTS)
        if len(set(self.parts)) < len(self.parts):
            raise InvalidInput(f"parts = {self.parts!r}: name each part once")

    def with_shares(self, shares: Mapping[Part, float]) -> PruneConfig:
        how: dict[str, Any] = {"score": self.score, "compensate": self.compensate}
        how |= {"uniform": self.uniform, "seed": self.seed}
        return PruneConfig(**shares, **how)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Plan:
    """The shares to remove, and what was measured to find them."""

    config: PruneConfig
    costs: Costs
    whole: float
    """The perplexity of the whole model."""
    layer_order: tuple[int, ...]
    """In which layers go, for `prune`."""
    points: tuple[Point, ...]
    """The plan's own, those of other ways at the same cost, and those of half of each."""

    @property
    def best(self) -> Point:
        return next(point for point in self.points if point.config == self.config)

    def as_dict(self) -> dict[str, Any]:
        return {
            "config": asdict(self.config),
            "of": self.costs.of,
            "whole": self.whole,
            "left out": dict(self.costs.why_not),
            "layer order": list(self.layer_order),
            "points": [point.as_dict() for point in self.points],
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Plan:
        """What `as_dict` gave; what each part costs is not in it. It may have been edited since."""
        from pydantic import TypeAdapter  # not needed to plan

        costs = {"of": content["of"], "whole": 0.0, "parts": {}, "why_not": content["left out"]}
        fields = {name: content[name] for name in ("config", "whole", "points")}
        fields |= {"costs": costs, "layer_order": content["layer order"]}
        plan: Plan = TypeAdapter(cls).validate_python(fields)
        if plan.config not in [point.config for point in plan.points]:
            raise ValueError("the plan is none of its points")
        figures = [
            plan.whole,
            *(p.saved for p in plan.points),
            *(p.perplexity for p in plan.points),
        ]
        if not (plan.whole > 0 and all(map(math.isfinite, figures))):
            raise ValueError("a figure of the plan is not a finite number")
        return plan

    def __str__(self) -> str:
        ratio = self.best.perplexity / self.whole
        return (
            f"{self.best}: {self.best.saved:.1%} of {self.costs.of} saved, perplexity times "
            f"{ratio:.3f}"
        )


def plan_pruning(
    model: nn.Module,
    fitted: Sequence[Batch],
    held_out: Sequence[Batch],
    config: PlanConfig | PruneConfig,
    *,
    controls: bool = True,
    layer_order: Sequence[int] = (),
    report: Report | None = None,
) -> Plan:
    """Choose the shares that lose least of those that save the budget, and measure their curve.

    Units are chosen and compensated for on the `fitted` batches, and the perplexity is that of the
    `held_out` ones. With the shares of a `PruneConfig` there is nothing to choose, and each part
    must have a smaller stock form. `controls` measures random units and those of the smallest
    weights beside it. If it is known from another plan in which order layers should go,
    `layer_order` gives it.
    """
    check_score(config.parts, config.score)
    of: Cost = config.of if isinstance(config, PlanConfig) else "parameters"
    costs = costs_of(model, config.parts, of)
    if isinstance(config, PlanConfig):
        search = _Search(model, costs, config)
        trials = Trials(model, fitted, held_out, costs, report, layer_order)
        chosen = search.run(trials)
    else:
        if costs.why_not:
            raise UnsupportedModel("; ".join(costs.why_not.values()))
        trials = Trials(model, fitted, held_out, costs, report, layer_order)
        chosen = config
    trials.curve(chosen, CONTROLS if controls else ())
    points = tuple(trials.points.values())
    return Plan(chosen, costs, trials.whole, trials.layer_order, points)


class _Search:
    """Finds the shares that lose least, from what each part loses alone."""

    def __init__(self, model: nn.Module, costs: Costs, config: PlanConfig) -> None:
        self.costs, self.config = costs, config
        self.levels = {part: levels_of(model, part) for part in costs.parts}
        if not self.levels:
            raise UnsupportedModel("; ".join(costs.why_not.values()))
        if self._most() < config.budget:
            raise self._too_much()

    def run(self, trials: Trials) -> PruneConfig:
        for part, levels in self.levels.items():
            for fraction in reversed(FRACTIONS):  # more layers first: the order holds for fewer
                share = self._enough_of(part, levels, fraction * self.config.budget, trials)
                if share is not None:
                    trials.measure(self.config.with_shares({part: share}))
        for _ in range(MIXTURES if len(self.levels) > 1 else 0):
            mixture = self._mixture(trials)
            nearly = trials.alike(mixture)
            if nearly is not None and self._is_enough(trials.points[nearly]):
                break
            trials.measure(mixture)
        enough = [point for point in trials.points.values() if self._is_enough(point)]
        if not enough:
            most = max(point.saved for point in trials.points.values())
            raise InvalidInput(
                f"no way that was tried saves {self.config.budget:g} of the {self.config.of}: the "
                f"most is {most:.2f}. Give a smaller budget, or more parts"
            )
        return min(enough, key=lambda point: point.perplexity).config

    def _is_enough(self, point: Point) -> bool:
        return point.saved >= ENOUGH * self.config.budget

    def _enough_of(self, part: Part, levels: Tensor, target: float, trials: Trials) -> float | None:
        """The smallest share of this part alone that saves so much; None if none does."""
        enough = levels[self.costs.saved({part: levels}) >= target]
        if self.config.of != "latency":
            return float(enough[0]) if len(enough) else None
        # What was measured at half of the part tells only roughly what other shares save.
        for share in enough[:: max(1, len(enough) // CORRECTIONS)].tolist():
            if trials.saved({part: share}) >= ENOUGH * target:
                return float(share)
        return None

    def _mixture(self, trials: Trials) -> PruneConfig:
        """What should lose least; a latency is measured, and the target corrected by it."""
        target = self.config.budget
        for _ in range(CORRECTIONS if self.config.of == "latency" else 1):
            shares = self._best_mixture(target, trials)
            saved = trials.saved(shares)
            if saved >= ENOUGH * self.config.budget:
                break
            target = min(target * self.config.budget / max(saved, 1e-3), self._most())
        return self.config.with_shares({part: share for part, share in shares.items() if share})

    def _best_mixture(self, target: float, trials: Trials) -> dict[Part, float]:
        parts = list(self.levels)
        zero = torch.zeros(1, dtype=torch.float64)
        grids = torch.meshgrid(
            *(torch.cat([zero, self.levels[part]]) for part in parts), indexing="ij"
        )
        shares = dict(zip(parts, grids, strict=True))
        lost = self._losses(trials).predict(shares)
        enough = self.costs.saved(shares) >= target
        if not bool(enough.any()):
            raise self._too_much()
        best = int(torch.where(enough, lost, torch.inf).argmin())
        return {part: float(share.flatten()[best]) for part, share in shares.items()}

    def _losses(self, trials: Trials) -> Losses:
        """What was measured so far of each part alone, and of mixtures."""
        alone: dict[Part, list[tuple[float, float]]] = {}
        mixtures: list[tuple[dict[Part, float], float]] = []
        for config, point in trials.points.items():
            loss, shares = math.log(point.perplexity / trials.whole), shares_of(config)
            if len(shares) > 1:
                mixtures.append((shares, loss))
            else:
                [(part, share)] = shares.items()
                alone.setdefault(part, []).append((share, loss))
        return Losses({part: sorted(own) for part, own in alone.items()}, mixtures)

    def _most(self) -> float:
        return float(self.costs.saved({part: float(own[-1]) for part, own in self.levels.items()}))

    def _too_much(self) -> InvalidInput:
        return InvalidInput(
            f"a budget of {self.config.budget:g} of {self.config.of} is more than "
            f"{' and '.join(self.levels)} can give, {self._most():.2f}"
        )


def levels_of(model: Any, part: Part) -> Tensor:
    """Shares of a part that can be removed, from the smallest upwards; at most LEVELS of them."""
    sites = sites_of(Anatomy.of(model), [part])
    units = len(sites) if part == "layers" else min(units_of(site) for site in sites)
    most = min(units - 1, int(MOST * units))
    counts = torch.linspace(1, max(most, 1), min(LEVELS, max(most, 1)), dtype=torch.float64)
    if part == "layers":
        return counts.round().unique() / units
    smallest = min(sites, key=units_of)
    removed = {removed_of(smallest, round(count) / units) for count in counts.tolist()}
    return torch.tensor(sorted(removed - {0}), dtype=torch.float64) / units
