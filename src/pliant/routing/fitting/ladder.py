"""The ladder of scorers: fit and measure each, then select the cheapest that is good enough."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from pliant.errors import InvalidInput
from pliant.routing.decision_rule import sweep
from pliant.routing.fitting.splits import Splits
from pliant.routing.metrics.curves import hull_area
from pliant.routing.metrics.ranking import band, difference
from pliant.routing.outcomes import Outcomes
from pliant.routing.scorers import READS_A_MODEL, Scorer, kind_class, make
from pliant.stats import Band, Floats, bootstrap_counts

Progress = Callable[[Sequence[str], str], Iterable[str]]

CONTROLS = ("random", "length", "group")
LADDER = (*CONTROLS, "tfidf", "tfidf-ridge", "knn", "pair", "text", "probe", "cpx")
EVERY = (*LADDER, "tfidf-logistic", "text+group")
"""With those that are expensive to fit, or that few can use."""
MARGIN = 0.02
"""How much APGR a cheap scorer may lose and still tie."""
_TIMED = 50  # prompts, one at a time
_POINTS = 200  # of the path of prices, for more than two models


@dataclass(frozen=True, eq=False)
class Rung:
    """A fitted scorer, and what it is worth on the ladder split."""

    kind: str
    scorer: Scorer
    gain: Floats
    """(n, m) on the ladder split."""
    value: Band
    """APGR; for more than two models see `value_of`."""
    fit_seconds: float
    ms: float
    """The median of one decision."""
    size: int
    """Bytes on disk."""
    behind: Band | None = None
    """The distance to the best, paired; None for the best itself."""

    def as_dict(self) -> dict[str, Any]:
        return {
            "scorer": self.kind,
            "value": self.value.as_dict(),
            "behind": None if self.behind is None else self.behind.as_dict(),
            "fit_seconds": self.fit_seconds,
            "ms": self.ms,
            "bytes": self.size,
            "chosen": self.scorer.chosen(),
        }


def climb(
    splits: Splits,
    kinds: Sequence[str],
    base: str | None,
    seed: int,
    progress: Progress = lambda items, _: items,
) -> list[Rung]:
    """Fit every scorer and compare it with the best on the ladder split."""
    for kind in kinds:
        kind_class(kind)  # refuses a wrong name before the work
    rungs: list[Rung] = []
    for kind in progress(kinds, "fitting"):
        scorer = make(kind, base=base) if kind in READS_A_MODEL else make(kind)
        rungs.append(_rung(scorer, splits, seed))
    best = max(rungs, key=_rank)
    return [
        rung if rung is best else _compared(rung, best, splits.ladder)
        for rung in sorted(rungs, key=_rank, reverse=True)
    ]


def select(
    rungs: Sequence[Rung],
    groups_known: bool = False,
    margin: float = MARGIN,
    outcomes: Outcomes | None = None,
) -> Rung:
    """The scorer with the fastest decision among those that tie with the best.

    A scorer ties if the paired interval of its distance to the best includes 0 (it was not shown to
    be worse) and ends within `margin` (it was shown not to be much worse). With few labels nothing
    is shown, so only the best itself ties. `random` is never selected, nor a scorer that needs a
    prompt's group unless `groups_known`: if that rules out the best one, the others are compared
    with the best that remains, on the `outcomes` of the ladder split.
    """
    fit = [r for r in rungs if r.kind != "random" and r.scorer.saveable]
    fit = [r for r in fit if groups_known or not r.scorer.needs_groups]
    if not fit:
        raise InvalidInput("none of these scorers can be selected: add text or cpx")
    best = max(fit, key=_rank)
    if math.isnan(best.value.value):  # nothing to gain, so nothing separates them
        return min(fit, key=lambda rung: rung.ms)

    def tied(rung: Rung) -> bool:
        if best.behind is None or outcomes is None:
            return ties(rung, margin)
        return ties(_compared(rung, best, outcomes), margin)

    return min((r for r in fit if r is best or tied(r)), key=lambda rung: rung.ms)


def _rank(rung: Rung) -> float:
    value = rung.value.value
    return -math.inf if math.isnan(value) else value


def ties(rung: Rung, margin: float = MARGIN) -> bool:
    """Whether it was not shown to be worse than the best, and shown not to be much worse."""
    if rung.behind is None:
        return True
    return rung.behind.high >= 0 and rung.behind.low > -margin


def value_of(gain: Floats, outcomes: Outcomes) -> Band:
    """APGR of two models. Of more: the area under quality against cost, between all to the cheapest
    and all to the most expensive, as prompts go to the highest gain - price * cost."""
    if len(outcomes.models) == 2:
        return band("apgr", gain[:, -1], outcomes)
    return _area_band(_area(gain, outcomes), outcomes)


def gap(a: Floats, b: Floats, outcomes: Outcomes) -> Band:
    """How much more a is worth than b, on the same resamples."""
    if len(outcomes.models) == 2:
        return difference("apgr", a[:, -1], b[:, -1], outcomes)
    area_a, area_b = _area(a, outcomes), _area(b, outcomes)
    return _area_band(lambda counts: area_a(counts) - area_b(counts), outcomes)


def _area_band(measure: Callable[[Floats], Floats], outcomes: Outcomes) -> Band:
    return bootstrap_counts(measure, len(outcomes), resamples=200, clusters=outcomes.questions)


def _area(gain: Floats, outcomes: Outcomes) -> Callable[[Floats], Floats]:
    """A statistic of counts; the choices at each price are computed once."""
    swept = sweep(gain, outcomes)
    values = swept.steps.values[:: max(1, len(swept.steps.values) // _POINTS)]
    values = np.unique(np.concatenate([values, [-np.inf, np.inf]]))
    routed = [outcomes.routed(swept.choose(float(value))) for value in values]
    right, cost = (np.stack(columns) for columns in zip(*routed, strict=True))

    def measure(counts: Floats) -> Floats:
        size = counts.sum(axis=1, keepdims=True)
        qualities, costs = counts @ right.T / size, counts @ cost.T / size
        areas = []
        for c, q in zip(costs, qualities, strict=True):
            order = np.argsort(c, kind="stable")
            spread = c.max() - c.min()
            area = hull_area(c[order], q[order]) / spread if spread > 0 else q.max()
            areas.append(area)  # at one price for all, there is only quality
        return np.asarray(areas)

    return measure


def _rung(scorer: Scorer, splits: Splits, seed: int) -> Rung:
    kind = scorer.kind
    begun = time.perf_counter()
    scorer.fit(splits.train, splits.choice, seed)
    seconds = time.perf_counter() - begun
    gain = scorer.predict(splits.ladder.asked, splits.ladder.groups).gain
    value = value_of(gain, splits.ladder)
    return Rung(kind, scorer, gain, value, seconds, decision_ms(scorer, splits), size_of(scorer))


def _compared(rung: Rung, best: Rung, outcomes: Outcomes) -> Rung:
    return replace(rung, behind=gap(rung.gain, best.gain, outcomes))


def decision_ms(scorer: Scorer, splits: Splits) -> float:
    """The median time of one decision, prompts one at a time."""
    outcomes, seconds = splits.ladder, []
    asked = outcomes.asked
    for i in range(min(_TIMED, len(outcomes))):
        groups = None if outcomes.groups is None else [outcomes.groups[i]]
        begun = time.perf_counter()
        scorer.predict([asked[i]], groups)
        seconds.append(time.perf_counter() - begun)
    return 1000 * float(np.median(seconds))


def size_of(scorer: Scorer) -> int:
    """The scorer's bytes on disk."""
    with TemporaryDirectory() as folder:
        scorer.save(Path(folder))
        return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
