"""From all prompts to the strongest model down to all to the cheapest: what each step does.

Two models take a threshold on the gain; any number take a price of cost (lambda), at which the
model with the highest gain - lambda * cost answers. Both are one number, and both send less to the
strong model the higher it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pliant.errors import InvalidInput
from pliant.routing.outcomes import Outcomes
from pliant.routing.prices import Chosen, most_worth, turns

Floats = NDArray[np.float64]
STEPS = 1000
"""Of a path of prices: at most so many are tried."""


@dataclass(frozen=True, eq=False)
class Steps:
    """The values that differ on a split, from the fewest strong calls to the most, and their means.

    The shares are of calls to the strongest model.
    """

    values: Floats
    shares: Floats
    qualities: Floats
    costs: Floats


@dataclass(frozen=True, eq=False)
class Path:
    """What a value means on a split."""

    on: Literal["gain", "worth"]
    outcomes: Outcomes
    chosen: Callable[[float], Chosen]
    """Which model each prompt goes to, at a value."""
    walk: Callable[[], Steps]
    span: float
    """What a gain of 1 is in units of the value: 1, or one over the range of the prices."""
    prices: tuple[float, ...] | None = None

    @cached_property
    def steps(self) -> Steps:
        return self.walk()


def path(gain: ArrayLike, outcomes: Outcomes, prices: ArrayLike | None = None) -> Path:
    """The path of predictions (n,), or (n, m) with the price of each model's answer."""
    predicted = np.asarray(gain, dtype=np.float64)
    if predicted.shape not in ((len(outcomes),), outcomes.right.shape):
        raise InvalidInput(
            f"gain: one finite number for each of {len(outcomes)} prompts is due (or one for each "
            f"of {len(outcomes.models)} models too), not {predicted.shape}"
        )
    if not np.isfinite(predicted).all():
        raise InvalidInput("gain: one finite number for each prompt is due, not NaN or infinity")
    if predicted.ndim == 1:
        if len(outcomes.models) != 2:
            raise InvalidInput(
                f"gain: with {len(outcomes.models)} models one is due for each, (n, m)"
            )
        return _of_gain(predicted, outcomes)
    paid = outcomes.cost.mean(axis=0) if prices is None else np.asarray(prices, dtype=np.float64)
    return _of_worth(predicted, outcomes, _ascending(paid, outcomes))


def _of_gain(gain: Floats, outcomes: Outcomes) -> Path:
    def walk() -> Steps:
        distinct, block = np.unique(-gain, return_inverse=True)
        between = -(distinct[:-1] + distinct[1:]) / 2
        extra = outcomes.cost[:, -1] - outcomes.cost[:, 0]
        shares, gained, paid = (
            np.concatenate([[0], np.cumsum(np.bincount(block, of))]) / len(outcomes)
            for of in (np.ones(len(outcomes)), outcomes.gain, extra)
        )
        values = np.concatenate([[np.inf], between, [-np.inf]])
        weak, paid_weak = outcomes.weak.mean(), outcomes.cost[:, 0].mean()
        return Steps(values, shares, weak + gained, paid_weak + paid)

    return Path("gain", outcomes, lambda value: (gain > value).astype(np.int64), walk, 1.0)


def _of_worth(gain: Floats, outcomes: Outcomes, prices: Floats) -> Path:
    def chosen(value: float) -> Chosen:
        return most_worth(gain, prices, value)

    def walk() -> Steps:
        values = np.concatenate([[np.inf], _turning_points(gain, prices)[::-1], [-np.inf]])
        rows, last = np.arange(len(outcomes)), len(prices) - 1
        steps = [chosen(float(value)) for value in values]
        return Steps(
            values,
            np.array([(step == last).mean() for step in steps]),
            np.array([outcomes.right[rows, step].mean() for step in steps]),
            np.array([outcomes.cost[rows, step].mean() for step in steps]),
        )

    span = float(1 / (prices[-1] - prices[0]))
    return Path("worth", outcomes, chosen, walk, span, tuple(prices.tolist()))


def _turning_points(gain: Floats, prices: Floats) -> Floats:
    """Values between those at which one model overtakes another on a prompt; ascending."""
    distinct = np.unique(turns(gain, prices))
    if len(distinct) > STEPS:
        distinct = np.unique(np.quantile(distinct, np.linspace(0, 1, STEPS)))
    margin = prices[-1] - prices[0]  # beyond the ends, where nothing turns any more
    ends = distinct[0] - 1 / margin, distinct[-1] + 1 / margin
    return np.concatenate([[ends[0]], (distinct[:-1] + distinct[1:]) / 2, [ends[1]]])


def _ascending(prices: Floats, outcomes: Outcomes) -> Floats:
    if prices.shape != (len(outcomes.models),) or not np.isfinite(prices).all():
        raise InvalidInput(f"prices: one number for each of {len(outcomes.models)} models is due")
    if (np.diff(prices) <= 0).any():
        shown = ", ".join(f"{m} {p:g}" for m, p in zip(outcomes.models, prices, strict=True))
        raise InvalidInput(f"prices: each model must be dearer than the one before it ({shown})")
    return prices
