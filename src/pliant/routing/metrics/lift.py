"""What any number of models are worth together: quality against cost, and beyond single models.

    lift = lift_of(gain, outcomes)            # a statistic of counts, for pliant.stats
    areas(gain, outcomes, prices)["lift"]     # with its band

The definitions:

- The router's points: its mean cost and quality on these prompts as the price of cost, lambda, goes
  down from infinity (each prompt goes to the model with the highest gain - lambda * price) to 0,
  and on to where every prompt goes to the strongest. Quality at a budget lies on the non-decreasing
  concave hull of the points, as in RouterBench: a budget between two points is met by mixing them.
- AIQ is the mean of that quality over the budgets from the cheapest model's mean cost to the most
  expensive one's. Where every model costs the same it is the quality of always asking the model
  that is likelier right.
- Lift is AIQ less that of the models alone: what is right because prompts are told apart, beyond
  the best mixture of single models of the same cost. It is 0 without information, whatever the
  prices. The mixture is chosen on these prompts, which favours the single models a little.

APGR, for two models, relates the same area to the difference between the two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from pliant.routing.decision_rule import sweep
from pliant.routing.metrics.curves import hull_area
from pliant.routing.outcomes import Outcomes
from pliant.stats import Band, Floats, bootstrap_counts, count_values, percentiles

Statistic = Callable[[Floats], Floats]
"""(resamples, n) counts of draws -> (resamples,) values."""
_POINTS = 100
"""Of the path of lambda."""


def areas(
    gain: ArrayLike,
    outcomes: Outcomes,
    prices: ArrayLike | None = None,
    scoring: ArrayLike | None = None,
    **how: Any,
) -> dict[str, Band]:
    """AIQ and lift of predictions (n, m); `prices` and `scoring` (m,) as in `aiq_of`. `how` is
    bootstrap's: resamples, seed, level, clusters."""
    aiq, alone = aiq_of(gain, outcomes, prices, scoring), alone_of(outcomes)

    def both(counts: Floats) -> Floats:
        values = aiq(counts)
        return np.stack([values, values - alone(counts)], axis=1)

    how = {"clusters": outcomes.questions, "resamples": 200, **how}
    level = how.pop("level", 0.95)
    resampled = count_values(both, len(outcomes), **how)
    (whole,) = both(np.ones((1, len(outcomes))))
    columns = zip(("aiq", "lift"), whole, resampled.T, strict=True)
    return {name: percentiles(value, column, level) for name, value, column in columns}


def area_difference(
    gain_a: ArrayLike,
    gain_b: ArrayLike,
    outcomes: Outcomes,
    prices: ArrayLike | None = None,
    **how: Any,
) -> Band:
    """AIQ of a less that of b (and so the lift's), both on the same resamples."""
    a, b = aiq_of(gain_a, outcomes, prices), aiq_of(gain_b, outcomes, prices)
    how = {"clusters": outcomes.questions, "resamples": 200, **how}
    return bootstrap_counts(lambda counts: a(counts) - b(counts), len(outcomes), **how)


def aiq_of(
    gain: ArrayLike,
    outcomes: Outcomes,
    prices: ArrayLike | None = None,
    scoring: ArrayLike | None = None,
) -> Statistic:
    """The choices at each lambda are computed once. `prices` (m,) are those that the router
    decides by; `scoring` is what scoring costs by the model that answers, which the budgets pay."""
    swept = sweep(gain, outcomes, prices, novel_to=None)
    values = np.zeros(1)
    if not outcomes.same_price:
        values = swept.steps.values  # from inf to -inf
        kept = np.linspace(0, len(values) - 1, min(_POINTS, len(values))).astype(np.int64)
        values = values[kept]
    choices = [swept.choose(float(value)) for value in values]
    paid = np.zeros(len(outcomes.models)) if scoring is None else np.asarray(scoring)
    right = np.stack([outcomes.routed(chosen)[0] for chosen in choices])
    cost = np.stack([outcomes.routed(chosen)[1] + paid[chosen] for chosen in choices])
    return lambda counts: _areas(right, cost, outcomes, counts)


def alone_of(outcomes: Outcomes) -> Statistic:
    """The same of the single models, and mixtures of them that do not look at the prompt."""
    return lambda counts: _areas(outcomes.right.T, outcomes.cost.T, outcomes, counts)


def _areas(right: Floats, cost: Floats, outcomes: Outcomes, counts: Floats) -> Floats:
    """(resamples,) the mean quality over budgets, of points (points, n)."""
    size = counts.sum(axis=1, keepdims=True)
    qualities, costs = counts @ right.T / size, counts @ cost.T / size
    models = counts @ outcomes.cost / size
    ends = [models.min(axis=1), models.max(axis=1)]
    # The cheapest model alone needs no router, and no scoring.
    cheapest = models.argmin(axis=1)
    floor = (counts @ outcomes.right / size)[np.arange(len(counts)), cheapest]
    rows = zip(costs, qualities, *ends, floor, strict=True)
    return np.array([_area(c, q, low, high, at_low) for c, q, low, high, at_low in rows])


def _area(cost: Floats, quality: Floats, low: float, high: float, at_low: float) -> float:
    if high <= low * (1 + 1e-9):  # one price, so the only budget
        return float(quality.max())
    within = cost <= high * (1 + 1e-9)
    costs = np.concatenate([[low], np.clip(cost[within], low, high), [high]])
    qualities = np.concatenate([[at_low], quality[within], [-np.inf]])
    order = np.argsort(costs, kind="stable")
    best = np.maximum.accumulate(qualities[order])
    return hull_area(costs[order], best) / (high - low)
