"""How good a ranking of prompts is for routing: curves of quality against cost, and their areas.

    apgr(gain, outcomes)                          # one number
    band("apgr", gain, outcomes)                  # with its bootstrap band
    difference("apgr", gain_a, gain_b, outcomes)  # of two scorers, paired
    report(gain, outcomes).as_dict()              # all of them, on the same resamples

The definitions, for two models (of more, the first and the last):

- Prompts go to the strong model in the order of their predicted gain. At share x of strong calls
  the quality Q(x) is the mean of right answers; Q(0) is the weak model's, Q(1) the strong one's.
  Equal predictions are taken in random order: Q is its expectation, a straight line across a tied
  block, whatever the order of the rows.
- PGR(x) = (Q(x) - Q(0)) / (Q(1) - Q(0)), and APGR is its mean over x from 0 to 1 (trapezoids
  between neighbouring prompts). A random order has 0.5; that of the true gains is the highest,
  (g+ - g+^2/2 - g-^2/2) / (g+ - g-), where only the strong model is right on a share g+ and only
  the weak one on g-. Undefined (NaN) unless the strong model is the better one.
- CPT(level) is the smallest x at which PGR(x) >= level.
- AIQ, as in RouterBench: over mean cost instead of x, the area under the non-decreasing concave
  hull of the curve, divided by the range of costs, from all weak to all strong. Ours takes the
  hull over GRID + 1 evenly spaced shares. A hull picks its points after the fact, so that even a
  random order lies a little above the line between the models.
- Within groups: the same share of each group goes to the strong model, in the order within the
  group. A ranking that knows the groups alone has 0.5. Group by group the areas are summed before
  dividing by the sum of the gains, so that each counts by its size, and one without any gain, or
  where the weak model is better, counts like all others: no group's own gain is divided by.
- AUC: does the score tell the prompts that the weak model fails on? It does not rank routers.

Shares of calls to one model mean nothing with more than two models, and save nothing where all cost
the same. There a report holds AIQ and lift alone, in the form of lift.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from pliant.errors import InvalidInput, did_you_mean
from pliant.routing.metrics.curves import Curve, Ranking, blocks, hull_area, quality_cost_curve
from pliant.routing.metrics.lift import area_difference, areas
from pliant.routing.outcomes import Outcomes
from pliant.stats import Band, Floats, as_json, bootstrap_counts
from pliant.stats import auc as stats_auc

GRID = 200
_FEWER: dict[str, Any] = {"aiq": {"resamples": 200}}
"""Each resample has a hull of its own, which takes as long as all other metrics together."""


def apgr(gain: ArrayLike, outcomes: Outcomes) -> float:
    """The mean share of the models' difference in quality that is recovered."""
    return _once("apgr", gain, outcomes)


def within_group_apgr(gain: ArrayLike, outcomes: Outcomes) -> float:
    """The same, of the order inside each group."""
    return _once("within_group_apgr", gain, outcomes)


def oracle_apgr(outcomes: Outcomes) -> float:
    """The highest APGR that any ranking can have: that of the true gains."""
    return apgr(outcomes.gain, outcomes)


def cpt(gain: ArrayLike, outcomes: Outcomes, level: float = 0.5) -> float:
    """The smallest share of strong calls that recovers `level` of the difference."""
    if not 0 < level <= 1:
        raise InvalidInput(f"level={level}: a share of the difference, above 0 and at most 1")
    ranking = Ranking.of(gain, outcomes)
    return float(_cpt(ranking, np.ones((1, ranking.n)), level)[0])


def aiq(gain: ArrayLike, outcomes: Outcomes) -> float:
    """The mean quality over the range of costs, of the curve's concave hull."""
    return _once("aiq", gain, outcomes)


def auc(score: ArrayLike, outcomes: Outcomes) -> float:
    """The probability that a prompt that the weak model fails on scores above another."""
    return stats_auc(score, 1 - outcomes.weak)


def band(metric: str, gain: ArrayLike, outcomes: Outcomes, **how: Any) -> Band:
    """A metric's value with its band. `how` is bootstrap's: resamples, seed, level, clusters.

    Wordings of one question are drawn together, here and below, unless `clusters` says otherwise.
    """
    ranking, measure = Ranking.of(gain, outcomes), _metric(metric)
    how = {"clusters": outcomes.questions, **how}
    return bootstrap_counts(lambda counts: measure(ranking, counts), ranking.n, **how)


def difference(
    metric: str, gain_a: ArrayLike, gain_b: ArrayLike, outcomes: Outcomes, **how: Any
) -> Band:
    """A metric of scorer a less that of b, both on the same resamples."""
    a, b, measure = Ranking.of(gain_a, outcomes), Ranking.of(gain_b, outcomes), _metric(metric)
    how = {"clusters": outcomes.questions, **how}
    return bootstrap_counts(lambda counts: measure(a, counts) - measure(b, counts), a.n, **how)


@dataclass(frozen=True, eq=False)
class Report:
    """Everything measured of a ranking on held-out prompts, all on the same resamples."""

    n: int
    models: tuple[str, ...]
    weak_quality: float
    strong_quality: float
    oracle_apgr: float
    metrics: Mapping[str, Band]
    """By name, as in METRICS, and lift; within groups only where there are any."""
    curve: Curve
    oracle_lift: float = math.nan
    """That of perfect routing; undefined in older files."""

    @property
    def ranked_by(self) -> str:
        """The metric that scorers are compared by."""
        return "apgr" if "apgr" in self.metrics else "lift"

    def as_dict(self) -> dict[str, Any]:
        return dict(as_json(self))


def report(
    gain: ArrayLike,
    outcomes: Outcomes,
    score: ArrayLike | None = None,
    prices: ArrayLike | None = None,
    **how: Any,
) -> Report:
    """All metrics with their bands; AUC is that of the `score`, if there is one beside the gain.

    `gain` is (n,) of the last of two models, or (n, m) over the first; `prices` (m,) are those that
    the router decides by. `how` is bootstrap's: resamples, seed, level, clusters.
    """
    by_model = _by_model(gain)
    last, shares = by_model[:, -1], ranks_by_share(outcomes)
    names = [name for name in METRICS if outcomes.groups or name != "within_group_apgr"]
    names = names if shares else ["auc"]
    ranked = {name: last for name in names} | ({} if score is None else {"auc": score})
    perfect = areas(outcomes.right - outcomes.right[:, :1], outcomes, prices, resamples=1)
    metrics = {
        name: band(name, ranked[name], outcomes, **_FEWER.get(name, {}) | how) for name in names
    }
    by_budget = areas(by_model, outcomes, prices, **how)
    return Report(
        len(outcomes),
        outcomes.models,
        float(outcomes.weak.mean()),
        float(outcomes.strong.mean()),
        oracle_apgr(outcomes) if shares else math.nan,
        metrics | {name: value for name, value in by_budget.items() if name not in metrics},
        quality_cost_curve(last, outcomes, **how),
        perfect["lift"].value,
    )


def ahead(
    gain_a: ArrayLike,
    gain_b: ArrayLike,
    outcomes: Outcomes,
    prices: ArrayLike | None = None,
    **how: Any,
) -> Band:
    """How much scorer a is ahead of b, paired, in what a report ranks by: APGR, or else lift."""
    a, b = _by_model(gain_a), _by_model(gain_b)
    if ranks_by_share(outcomes):
        return difference("apgr", a[:, -1], b[:, -1], outcomes, **how)
    return area_difference(a, b, outcomes, prices, **how)


def ranks_by_share(outcomes: Outcomes) -> bool:
    """Whether the share of calls to the last model measures a router: of two models, at two
    prices."""
    return len(outcomes.models) == 2 and not outcomes.same_price


def _by_model(gain: ArrayLike) -> Floats:
    values = np.asarray(gain, dtype=np.float64)
    return values if values.ndim == 2 else np.stack([np.zeros_like(values), values], axis=1)


# --- computing -----------------------------------------------------------------------------------


def _apgr(ranking: Ranking, counts: Floats) -> Floats:
    drawn, gained = ranking.cumulated(counts), ranking.gained(counts)
    return _over(_area(drawn, gained), drawn[:, -1] * gained[:, -1], gained[:, -1])


def _within_group_apgr(ranking: Ranking, counts: Floats) -> Floats:
    groups = ranking.outcomes.groups
    if groups is None:
        raise InvalidInput("within_group_apgr: these outcomes have no groups")
    area, total = np.zeros(len(counts)), np.zeros(len(counts))
    number = np.unique(groups, return_inverse=True)[1]
    place = np.empty(ranking.n, dtype=np.int64)  # the number of each prompt's block
    place[ranking.order] = np.repeat(
        np.arange(len(ranking.starts)), np.diff(ranking.starts, append=ranking.n)
    )
    for g in range(number.max() + 1):
        rows = np.flatnonzero(number == g)
        order, starts = blocks(-place[rows].astype(np.float64))
        part = Ranking(order, starts, ranking.gain[rows], ranking.extra[rows], ranking.outcomes)
        drawn, gained = part.cumulated(counts[:, rows]), part.gained(counts[:, rows])
        area += _area(drawn, gained) / np.maximum(drawn[:, -1], 1)
        total += gained[:, -1]
    return _over(area, total, total)


def _cpt(ranking: Ranking, counts: Floats, level: float) -> Floats:
    drawn, gained = ranking.cumulated(counts), ranking.gained(counts)
    target = level * gained[:, -1]
    # The last point reaches every level; rounding must not prevent that.
    reached = gained >= target[:, None] - 1e-9 * np.abs(target[:, None])
    end = reached.argmax(axis=1)  # the first; never 0, where the gain is positive
    rows = np.arange(len(counts))
    before = np.maximum(end - 1, 0)
    x0, x1 = drawn[rows, before], drawn[rows, end]
    y0, y1 = gained[rows, before], gained[rows, end]
    part = np.divide(target - y0, y1 - y0, out=np.ones_like(target), where=y1 > y0)
    crossing = x0 + np.clip(part, 0, 1) * (x1 - x0)
    return _over(crossing, drawn[:, -1], gained[:, -1])


def _aiq(ranking: Ranking, counts: Floats) -> Floats:
    quality, cost = ranking.curve(counts, np.linspace(0, 1, GRID + 1))
    lines = zip(cost, quality, strict=True)
    areas = [hull_area(c, q) / (c[-1] - c[0]) if c[-1] > c[0] else np.nan for c, q in lines]
    return np.array(areas)


def _auc(ranking: Ranking, counts: Floats) -> Floats:
    """Of the ranking, for the prompts that the weak model fails on."""
    failed = 1 - ranking.outcomes.weak
    positive = ranking.cumulated(counts * failed)
    negative = ranking.cumulated(counts * (1 - failed))
    pairs = positive[:, -1] * negative[:, -1]
    return _over(_area(negative, positive), pairs, pairs)


METRICS: dict[str, Callable[[Ranking, Floats], Floats]] = {
    "apgr": _apgr,
    "within_group_apgr": _within_group_apgr,
    "cpt50": lambda ranking, counts: _cpt(ranking, counts, 0.5),
    "cpt80": lambda ranking, counts: _cpt(ranking, counts, 0.8),
    "aiq": _aiq,
    "auc": _auc,
}


def _once(metric: str, gain: ArrayLike, outcomes: Outcomes) -> float:
    ranking = Ranking.of(gain, outcomes)
    return float(METRICS[metric](ranking, np.ones((1, ranking.n)))[0])


def _metric(name: str) -> Callable[[Ranking, Floats], Floats]:
    if name not in METRICS:
        raise InvalidInput(f"no metric {name!r}{did_you_mean(name, METRICS)}")
    return METRICS[name]


def _area(x: Floats, y: Floats) -> Floats:
    return (np.diff(x, axis=1) * (y[:, 1:] + y[:, :-1])).sum(axis=1) / 2


def _over(top: Floats, bottom: Floats, gain: Floats) -> Floats:
    """The quotient if the strong model is the better one, else NaN."""
    return np.divide(top, bottom, out=np.full_like(top, np.nan), where=gain > 1e-12)
