"""What was measured of a router on held-out prompts, to JSON and back; a report only draws it.

content = evaluation.as_dict()                  # what `pliant route evaluate --json` prints
Evaluation.from_dict(content).routed.quality
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from pliant.errors import InvalidInput
from pliant.routing.fitting.verdict import Verdict
from pliant.routing.metrics.ranking import Report
from pliant.routing.units import percent, same_price
from pliant.stats import Band, as_json, from_json

SIDES = ("surely cheap", "just cheap", "just expensive", "surely expensive")
Json = Mapping[str, Any]


@dataclass(frozen=True)
class Routed:
    """What the router's threshold does with the prompts."""

    shares: dict[str, float]
    """Of calls, by model."""
    quality: Band
    of_strong: Band
    """The quality as a share of the strongest model's."""
    cost: Band
    """Of a prompt, with scoring, unless the answer continues from the scorer's prefill."""
    of_strong_cost: Band
    """The cost as a share of always asking the strongest model."""

    @property
    def share(self) -> float:
        """Of calls to the strongest model."""
        return list(self.shares.values())[-1]


@dataclass(frozen=True)
class Reliability:
    """How well P(a model is right) is calibrated, beside what a constant would get."""

    model: str
    ece: float
    ece_constant: float
    brier: float
    brier_constant: float
    skill: float | None
    """1 - Brier / the constant's."""
    bins: tuple[tuple[float, float, int], ...]
    """(mean prediction, share right, prompts) of bins of equal size."""


@dataclass(frozen=True)
class Histogram:
    """Scores, by whether the first model was right."""

    edges: tuple[float, ...]
    model: str
    right: tuple[float, ...]
    wrong: tuple[float, ...]


@dataclass(frozen=True)
class Example:
    """A prompt, its predictions, and which models were right."""

    prompt: str
    gain: float
    chosen: str
    right: dict[str, float]
    score: float | None = None


@dataclass(frozen=True)
class Paraphrases:
    """Whether the same question in other words goes to the same model."""

    questions: int
    same_model: float
    """The share of questions all of whose wordings go to one model."""
    spread: float
    """The mean, over questions, of the range of the predicted gain."""


@dataclass(frozen=True)
class GroupResult:
    """The prompts of one group."""

    name: str
    n: int
    weak: float
    strong: float
    routed: float
    share: float
    """Of calls to the strongest model."""
    lost: Band | None = None
    """The strongest model's share of right answers less the router's; None in older files."""
    alone: dict[str, float] = field(default_factory=dict)
    """The share of right answers of each model; empty in older files."""


@dataclass(frozen=True)
class CostLine:
    """Quality against cost, from all to the first model to all to the strongest."""

    cost: tuple[float, ...]
    quality: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Everything that is measured on one set of prompts."""

    scorer: str
    report: Report
    baselines: Mapping[str, Report]
    over: Mapping[str, Band]
    """The router's APGR less each baseline's, paired."""
    routed: Routed
    threshold: float
    calibration: tuple[Reliability, ...]
    histogram: Histogram | None
    examples: dict[str, tuple[Example, ...]]
    """By SIDES: the nearest to the threshold on both sides, and the farthest from it."""
    novel: float | None
    """The share of prompts unlike those that the router was fitted on."""
    left_out: int = 0
    """Prompts that the router was fitted on: not counted in anything above."""
    incomplete: int = 0
    """Prompts that not every model was asked: not counted either."""
    paraphrases: Paraphrases | None = None
    groups: tuple[GroupResult, ...] = ()
    perfect: CostLine | None = None
    """Of perfect routing, which knows which models will be right."""
    by_price: CostLine | None = None
    """Of more than two models: the router's own, as the price of cost goes up."""
    costs: dict[str, float] = field(default_factory=dict)
    """Of a prompt, by model, if that model answers every one; empty in older files."""
    qualities: dict[str, float] = field(default_factory=dict)
    """The share of right answers of each model alone; empty in older files."""
    verdict: Verdict | None = None
    """Whether the router pays; None in older files."""

    @property
    def cheap_cost(self) -> float:
        """Of a prompt, if the first model answers every one, without scoring."""
        return self.costs.get(self.report.models[0], float(self.report.curve.cost[0]))

    @property
    def strong_cost(self) -> float:
        """Of a prompt, if the strongest model answers every one, without scoring."""
        return self.costs.get(self.report.models[-1], float(self.report.curve.cost[-1]))

    @property
    def alone(self) -> dict[str, float]:
        """The share of right answers of each model alone; in older files of the first and last."""
        report = self.report
        first, last = report.models[0], report.models[-1]
        return self.qualities or {first: report.weak_quality, last: report.strong_quality}

    @property
    def same_price(self) -> bool:
        """Whether an answer costs the same whichever model gives it."""
        return same_price(self.costs.values() or (self.cheap_cost, self.strong_cost))

    @property
    def no_difference(self) -> str:
        """Why nothing can be measured, where every model is right on all prompts or on none."""
        alone = self.alone.values()
        if max(alone) == 0:
            return (
                "No model is right on any of these prompts, so nothing can be measured: check how "
                "the answers were graded."
            )
        if min(alone) == 1:
            return "Every model is right on all of these prompts, so nothing can be measured."
        return ""

    @property
    def metrics(self) -> Mapping[str, Band]:
        return self.report.metrics

    def as_dict(self) -> dict[str, Any]:
        """For JSON; the report's own figures are not nested."""
        content = as_json(self)
        content["threshold"] = (
            self.threshold if np.isfinite(self.threshold) else str(self.threshold)
        )
        content["verdict"] = None if self.verdict is None else self.verdict.as_dict()
        return {**content.pop("report"), **content}

    @classmethod
    def from_dict(cls, content: Json) -> Evaluation:
        """Read what `as_dict` wrote, now or before it had groups and lines."""
        try:
            names = [field.name for field in fields(cls)]
            nested = {
                **{name: content[name] for name in names if name in content},
                "report": {f.name: content[f.name] for f in fields(Report) if f.name in content},
                "histogram": content["histogram"] or None,
                "examples": _examples(content["examples"]),
                "novel": content["novel"] if "novel" in content else content["far"],
                "verdict": _verdict(content.get("verdict")),
            }
            evaluation: Evaluation = from_json(cls, nested)
            return evaluation
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InvalidInput(f"not an evaluation as Pliant writes it ({error!r})") from error

    def __str__(self) -> str:
        strong, routed = self.report.models[-1], self.routed
        if self.same_price or len(self.report.models) > 2:
            calls = ", ".join(f"{percent(part)} to {name}" for name, part in routed.shares.items())
            price = f", at {routed.of_strong_cost} of its cost"
            if self.same_price:
                price = "; every model costs the same"
            quality = f"quality {routed.quality}, {routed.of_strong} of {strong}'s{price}"
            return f"Calls go {calls}: {quality}."
        return (
            f"At the router's threshold {percent(routed.share)} of calls go to {strong}: quality "
            f"{routed.quality}, {routed.of_strong} of {strong}'s, at {routed.of_strong_cost} of "
            "its cost."
        )


def _verdict(content: Json | None) -> Json | None:
    """The fields alone; what follows from them is computed again."""
    names = [field.name for field in fields(Verdict)]
    return content and {name: content[name] for name in names if name in content}


def _examples(content: Json) -> dict[str, Any]:
    """By side; older files call the expensive model dear."""
    named = {side.replace("dear", "expensive"): examples for side, examples in content.items()}
    return {side: named[side] for side in SIDES}
