"""Curves of quality against cost, and the ranking that they are computed from.

ranking.py defines what a point of a curve is; this file computes it.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pliant.errors import InvalidInput
from pliant.routing.decision_rule import DecisionRule, turning_points
from pliant.routing.outcomes import Outcomes
from pliant.stats import Floats, as_json, count_values

_DECIMALS = 9
"""Of predictions that are compared, relative to the largest."""


@dataclass(frozen=True, eq=False)
class Curve:
    """Quality and cost at each share of strong calls, with bands of the quality."""

    share: Floats
    cost: Floats
    """The mean cost of a prompt, in the outcomes' unit."""
    quality: Floats
    low: Floats
    high: Floats
    unit: str

    def as_dict(self) -> dict[str, Any]:
        return dict(as_json(self))


def quality_cost_curve(
    gain: ArrayLike,
    outcomes: Outcomes,
    points: int = 101,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    clusters: Sequence[Hashable] | None = None,
) -> Curve:
    """The curve at evenly spaced shares, each point's band over resamples of the prompts.

    Wordings of one question are drawn together, unless `clusters` says otherwise.
    """
    ranking, at = Ranking.of(gain, outcomes), np.linspace(0, 1, points)
    quality, cost = ranking.curve(np.ones((1, ranking.n)), at)
    resampled = count_values(
        lambda counts: ranking.curve(counts, at)[0],
        ranking.n,
        resamples,
        seed,
        outcomes.questions if clusters is None else clusters,
    )
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2], axis=0)
    q = quality[0]
    return Curve(at, cost[0], q, np.minimum(low, q), np.maximum(high, q), outcomes.unit)


@dataclass(frozen=True, eq=False)
class LambdaCurve:
    """Quality against cost with any number of models, as the price of cost goes from 0 upwards."""

    price: Floats
    """Lambda: what one unit of cost is worth in quality; ascending, the last one infinite."""
    cost: Floats
    quality: Floats
    shares: Floats
    """(points, m): the share of prompts that each model answers."""
    models: tuple[str, ...]
    unit: str

    def as_dict(self) -> dict[str, Any]:
        """For JSON; the infinite price is null."""
        return dict(as_json(self))


def lambda_curve(
    value: ArrayLike,
    outcomes: Outcomes,
    prices: ArrayLike | None = None,
    points: int = 101,
    novel: ArrayLike | None = None,
    novel_to: int | None = None,
) -> LambdaCurve:
    """Each prompt goes to the model with the highest value - lambda * price, ties to the cheaper.

    `value` (n, m) is the predicted quality (or gain over the first model) and `prices`, (m,) or
    (n, m), what the router believes that an answer costs; left out, each model's mean in these
    outcomes. `novel` prompts go to the model `novel_to` at any price. Lambda takes 0, infinity,
    and quantiles of the values at which a choice changes.
    """
    outcomes.refuse_incomplete("a curve is measured by who was right")
    predicted = np.asarray(value, dtype=np.float64)
    believed = outcomes.cost.mean(axis=0) if prices is None else np.asarray(prices, dtype=float)
    believed = np.broadcast_to(believed, outcomes.cost.shape)
    if predicted.shape != outcomes.right.shape or not np.isfinite(predicted).all():
        raise InvalidInput(f"value: finite numbers {outcomes.right.shape}, not {predicted.shape}")
    turning = turning_points(predicted, believed)
    turning = turning[turning > 0]
    if len(turning):
        turning = np.quantile(turning, np.linspace(0, 1, max(points - 2, 1)))
    m = len(outcomes.models)
    price = np.unique(np.concatenate([[0.0], turning, [np.inf]]))
    choices = [
        DecisionRule(float(p), m, believed, novel_to).choose(predicted, novel) for p in price
    ]
    routed = [outcomes.routed(chosen) for chosen in choices]
    return LambdaCurve(
        price,
        np.array([cost.mean() for _, cost in routed]),
        np.array([right.mean() for right, _ in routed]),
        np.stack([outcomes.shares(chosen) for chosen in choices]),
        outcomes.models,
        outcomes.unit,
    )


@dataclass(frozen=True, eq=False)
class Ranking:
    """Prompts in the order of their predicted gain, as blocks of equal predictions.

    Its sums accept (resamples, n) counts of how often each prompt was drawn, so that one sort
    serves all resamples.
    """

    order: NDArray[np.int64]
    starts: NDArray[np.int64]
    """Where in `order` each block begins."""
    gain: Floats
    """The true gain of each prompt, not sorted."""
    extra: Floats
    """The additional cost of the strong model."""
    outcomes: Outcomes

    @classmethod
    def of(cls, gain: ArrayLike, outcomes: Outcomes) -> Ranking:
        outcomes.refuse_incomplete("a ranking is measured by who was right")
        predicted = np.asarray(gain, dtype=np.float64)
        if predicted.shape != (len(outcomes),) or not np.isfinite(predicted).all():
            raise InvalidInput(
                f"gain must hold one finite number for each of {len(outcomes)} prompts, "
                f"not {predicted.shape}"
            )
        order, starts = blocks(predicted)
        extra = outcomes.cost[:, -1] - outcomes.cost[:, 0]
        return cls(order, starts, outcomes.gain, extra, outcomes)

    @property
    def n(self) -> int:
        return len(self.order)

    def gained(self, counts: Floats) -> Floats:
        """The sum of the true gains at the end of each block."""
        return self.cumulated(counts * self.gain)

    def paid(self, counts: Floats) -> Floats:
        """The sum of the extra costs at the end of each block."""
        return self.cumulated(counts * self.extra)

    def curve(self, counts: Floats, at: Floats) -> tuple[Floats, Floats]:
        """Quality and mean cost at these shares of strong calls: (resamples, shares) both."""
        drawn, size = self.cumulated(counts), counts.sum(axis=1)
        lines = zip(drawn, self.gained(counts), self.paid(counts), size, strict=True)
        gained, paid = [], []
        for x, g, c, total in lines:
            gained.append(np.interp(at * total, x, g) / total)
            paid.append(np.interp(at * total, x, c) / total)
        weak = (counts @ self.outcomes.weak) / size
        base = (counts @ self.outcomes.cost[:, 0]) / size
        return weak[:, None] + np.stack(gained), base[:, None] + np.stack(paid)

    def cumulated(self, values: Floats) -> Floats:
        """(resamples, 1 + blocks) the sums of the values up to the end of each block, from 0."""
        sums = np.add.reduceat(values[:, self.order], self.starts, axis=1)
        return np.cumsum(np.pad(sums, ((0, 0), (1, 0))), axis=1)


def hull_area(cost: Floats, quality: Floats) -> float:
    """The area under the non-decreasing concave hull of the points, from first to last cost.

    The hull is the least concave curve above all points, level after its highest.
    """
    order = np.lexsort((quality, cost))
    order = order[cost[order] <= cost[-1]]  # not what costs more than the strongest model alone
    along = np.maximum(cost[order], cost[0]).tolist()
    best = np.maximum.accumulate(quality[order]).tolist()
    xs: list[float] = []
    ys: list[float] = []
    for x, y in zip(along, best, strict=True):
        # The last point goes if it lies on or under the line from the one before it to this one.
        while xs and (
            xs[-1] == x
            or len(xs) > 1
            and (ys[-1] - ys[-2]) * (x - xs[-2]) <= (y - ys[-2]) * (xs[-1] - xs[-2])
        ):
            xs.pop()
            ys.pop()
        xs.append(x)
        ys.append(y)
    return float(np.trapezoid(ys, xs))


def blocks(predicted: Floats) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The descending order, and where each block of equal predictions begins in it.

    Those of two prompts that a scorer cannot tell apart differ by rounding errors.
    """
    largest = np.abs(predicted).max(initial=0.0)
    predicted = (predicted / (largest or 1.0)).round(_DECIMALS)
    order = np.argsort(-predicted, kind="stable")
    along = predicted[order]
    return order, np.flatnonzero(np.concatenate([[True], along[1:] != along[:-1]]))
