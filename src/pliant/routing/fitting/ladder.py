"""The ladder of scorers: each is fitted and measured, and the cheapest that is as good is kept."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pliant.errors import InvalidInput
from pliant.routing.fitting.splits import Parts
from pliant.routing.goals.sweep import sweep
from pliant.routing.metrics.curves import hull_area
from pliant.routing.metrics.ranking import band, difference
from pliant.routing.outcomes import Outcomes
from pliant.routing.scorers import Scorer, kind_class, make
from pliant.stats import Band, bootstrap_counts

Floats = NDArray[np.float64]
Progress = Callable[[Sequence[str], str], Iterable[str]]

CONTROLS = ("random", "length", "group")
LADDER = (*CONTROLS, "tfidf", "tfidf-ridge", "knn", "pair", "text", "probe", "cpx")
EVERY = (*LADDER, "tfidf-logistic", "text+group")
"""With those that are dear to fit, or that few can use."""
READS_A_MODEL = ("probe", "cpx")
MARGIN = 0.02
"""How much APGR a cheap scorer may lose for sure and still tie."""
_TIMED = 50  # prompts, one at a time
_POINTS = 200  # of the path of prices, for more than two models


@dataclass(frozen=True, eq=False)
class Rung:
    """A fitted scorer, and what it was worth on the ladder split."""

    kind: str
    scorer: Scorer
    gain: Floats
    """(n, m) on the ladder split."""
    value: Band
    """APGR; of more than two models, what `value_of` says."""
    fit_seconds: float
    ms: float
    """The median of one decision."""
    size: int
    """Bytes on disk."""
    behind: Band | None = None
    """How far behind the best, paired; None for the best itself."""

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
    parts: Parts,
    kinds: Sequence[str],
    base: str | None,
    seed: int,
    progress: Progress = lambda items, _: items,
) -> list[Rung]:
    """Fit every scorer and hold it against the best on the ladder split."""
    for kind in kinds:
        kind_class(kind)  # a wrong name is said before the work
    rungs: list[Rung] = []
    for kind in progress(kinds, "fitting"):
        rungs.append(_rung(_scorer(kind, base), parts, seed))
    best = max(rungs, key=_rank)
    return [
        rung if rung is best else _held_against(rung, best, parts.ladder)
        for rung in sorted(rungs, key=_rank, reverse=True)
    ]


def keep(
    rungs: Sequence[Rung],
    groups_known: bool = False,
    margin: float = MARGIN,
    outcomes: Outcomes | None = None,
) -> Rung:
    """The cheapest a decision of those that tie with the best.

    A scorer ties if the paired interval of its distance to the best includes 0 (it was not shown to
    be worse) and ends within `margin` (it was shown not to be much worse). With few labels nothing
    is shown, so nothing but the best itself ties. Chance is never kept, nor a scorer that needs a
    prompt's group, unless whoever routes knows it: where the best of all cannot be kept, the rest
    are held against the best that can, on the `outcomes` of the ladder split.
    """
    fit = [r for r in rungs if r.kind != "random" and r.scorer.saveable]
    fit = [r for r in fit if groups_known or not r.scorer.needs_groups]
    if not fit:
        raise InvalidInput("none of these scorers can be kept: add text or cpx")
    best = max(fit, key=_rank)
    if math.isnan(best.value.value):  # nothing to gain, so nothing that tells them apart
        return min(fit, key=lambda rung: rung.ms)

    def tied(rung: Rung) -> bool:
        if best.behind is None or outcomes is None:
            return ties(rung, margin)
        return ties(_held_against(rung, best, outcomes), margin)

    return min((r for r in fit if r is best or tied(r)), key=lambda rung: rung.ms)


def _rank(rung: Rung) -> float:
    value = rung.value.value
    return -math.inf if math.isnan(value) else value


def ties(rung: Rung, margin: float = MARGIN) -> bool:
    """Whether it was not shown to be worse than the best, and shown not to be much worse."""
    if rung.behind is None:
        return True
    return rung.behind.high >= 0 and rung.behind.low > -margin


def value_of(gain: Floats, outcomes: Outcomes, **how: Any) -> Band:
    """APGR of two models. Of more: the area under quality against cost, between all to the cheapest
    and all to the dearest, as prompts go to the highest gain - price * cost."""
    if len(outcomes.models) == 2:
        return band("apgr", gain[:, -1], outcomes, **how)
    measure = _area(gain, outcomes)
    how = {"resamples": 200, "clusters": outcomes.questions, **how}
    return bootstrap_counts(measure, len(outcomes), **how)


def gap(a: Floats, b: Floats, outcomes: Outcomes, **how: Any) -> Band:
    """What a is worth more than b, on the same resamples."""
    if len(outcomes.models) == 2:
        return difference("apgr", a[:, -1], b[:, -1], outcomes, **how)
    one, other = _area(a, outcomes), _area(b, outcomes)
    how = {"resamples": 200, "clusters": outcomes.questions, **how}
    return bootstrap_counts(lambda counts: one(counts) - other(counts), len(outcomes), **how)


def _area(gain: Floats, outcomes: Outcomes) -> Callable[[Floats], Floats]:
    """A statistic of counts; the choices at each price are made once."""
    swept = sweep(gain, outcomes)
    values = swept.steps.values[:: max(1, len(swept.steps.values) // _POINTS)]
    values = np.unique(np.concatenate([values, [-np.inf, np.inf]]))
    rows = np.arange(len(outcomes))
    picks = [swept.choose(float(value)) for value in values]
    right = np.stack([outcomes.right[rows, pick] for pick in picks])
    cost = np.stack([outcomes.cost[rows, pick] for pick in picks])

    def measure(counts: Floats) -> Floats:
        size = counts.sum(axis=1, keepdims=True)
        qualities, costs = counts @ right.T / size, counts @ cost.T / size
        found = []
        for c, q in zip(costs, qualities, strict=True):
            order = np.argsort(c, kind="stable")
            found.append(hull_area(c[order], q[order]) / max(c.max() - c.min(), 1e-12))
        return np.asarray(found)

    return measure


def _scorer(kind: str, base: str | None) -> Scorer:
    return make(kind, base=base) if kind in READS_A_MODEL else make(kind)


def _rung(scorer: Scorer, parts: Parts, seed: int) -> Rung:
    kind = scorer.kind
    begun = time.perf_counter()
    scorer.fit(parts.train, parts.choice, seed)
    seconds = time.perf_counter() - begun
    gain = scorer.predict(parts.ladder.asked, parts.ladder.groups).gain
    value = value_of(gain, parts.ladder)
    return Rung(kind, scorer, gain, value, seconds, decision_ms(scorer, parts), size_of(scorer))


def _held_against(rung: Rung, best: Rung, outcomes: Outcomes) -> Rung:
    behind = gap(rung.gain, best.gain, outcomes)
    kept = {name: getattr(rung, name) for name in ("fit_seconds", "ms", "size")}
    return Rung(rung.kind, rung.scorer, rung.gain, rung.value, behind=behind, **kept)


def decision_ms(scorer: Scorer, parts: Parts) -> float:
    """The median time of one decision, prompts one at a time."""
    outcomes, seconds = parts.ladder, []
    asked = outcomes.asked
    for i in range(min(_TIMED, len(outcomes))):
        groups = None if outcomes.groups is None else [outcomes.groups[i]]
        begun = time.perf_counter()
        scorer.predict([asked[i]], groups)
        seconds.append(time.perf_counter() - begun)
    return 1000 * float(np.median(seconds))


def size_of(scorer: Scorer) -> int:
    """Bytes that the scorer takes on disk."""
    with TemporaryDirectory() as folder:
        scorer.save(Path(folder))
        return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
