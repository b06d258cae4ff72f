"""Every threshold from "all to the cheapest model" to "all to the strongest", and what each does.

Two models take a threshold on the gain; any number take a price for a unit of cost (lambda). Both
are the `value` of a DecisionRule, and the higher it is the fewer prompts go to the strongest model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pliant.errors import InvalidInput
from pliant.routing.decision_rule import Chosen, DecisionRule, turning_points
from pliant.routing.outcomes import Outcomes

Floats = NDArray[np.float64]
STEPS = 1000
"""At most so many prices are tried."""


@dataclass(frozen=True, eq=False)
class Steps:
    """The distinct values on a split, from the fewest calls to the strongest model to the most."""

    values: Floats
    shares: Floats
    """Of calls to the strongest model."""
    qualities: Floats
    costs: Floats


@dataclass(frozen=True, eq=False)
class Sweep:
    """What a rule does on a split at each value."""

    rule: DecisionRule
    """Its own value is not used."""
    gain: Floats
    """(n,) of the last of two models, or (n, m)."""
    novel: NDArray[np.bool_] | None
    outcomes: Outcomes

    def choose(self, value: float) -> Chosen:
        """(n,) the model that answers each prompt, at a value."""
        return replace(self.rule, value=value).choose(self.gain, self.novel)

    @property
    def unit_gain(self) -> float:
        """What a gain of 1 is in units of the value: 1, or 1 over the range of the prices."""
        prices = self.rule.prices
        return 1.0 if prices is None else 1 / (prices[-1] - prices[0])

    @cached_property
    def steps(self) -> Steps:
        by_gain = self.novel is None or ~self.novel
        gain = self.gain if self.novel is None else self.gain[by_gain]
        if self.rule.prices is None:
            return self._gain_steps(gain, by_gain)
        values = _between(turning_points(gain, self.rule.prices), self.unit_gain)
        return self._at(np.concatenate([[np.inf], values[::-1], [-np.inf]]))

    def _at(self, values: Floats) -> Steps:
        rows, last = np.arange(len(self.outcomes)), self.rule.models - 1
        right, cost = self.outcomes.right, self.outcomes.cost
        steps = [self.choose(float(value)) for value in values]
        return Steps(
            values,
            np.array([(step == last).mean() for step in steps]),
            np.array([right[rows, step].mean() for step in steps]),
            np.array([cost[rows, step].mean() for step in steps]),
        )

    def _gain_steps(self, gain: Floats, by_gain: NDArray[np.bool_] | bool) -> Steps:
        """One step for each distinct gain, by cumulated sums: there may be as many as prompts."""
        outcomes, first = self.outcomes, self._at(np.array([np.inf]))
        distinct, block = np.unique(-gain, return_inverse=True)
        between = -(distinct[:-1] + distinct[1:]) / 2
        extra = outcomes.cost[:, -1] - outcomes.cost[:, 0]
        n, rows = len(outcomes), np.flatnonzero(np.broadcast_to(by_gain, len(outcomes)))
        shares, gained, paid = (
            np.concatenate([[0], np.cumsum(np.bincount(block, of[rows], minlength=1))]) / n
            for of in (np.ones(n), outcomes.gain, extra)
        )
        values = np.concatenate([[np.inf], between, [-np.inf]])
        return Steps(values, first.shares + shares, first.qualities + gained, first.costs + paid)


def sweep(
    gain: ArrayLike,
    outcomes: Outcomes,
    prices: ArrayLike | None = None,
    novel: ArrayLike | None = None,
    novel_to: int = -1,
) -> Sweep:
    """The sweep over predictions (n,), or (n, m) with the price of each model's answer.

    Prompts flagged as `novel` go to the model `novel_to` at every value.
    """
    predicted = np.asarray(gain, dtype=np.float64)
    n, m = outcomes.right.shape
    if predicted.shape not in ((n,), (n, m)):
        raise InvalidInput(
            f"gain must hold one finite number for each of {n} prompts (or for each of {m} models "
            f"too); its shape is {predicted.shape}"
        )
    if not np.isfinite(predicted).all():
        raise InvalidInput("gain holds NaN or infinity; it must be finite for every prompt")
    if predicted.ndim == 1 and m != 2:
        raise InvalidInput(f"gain: with {m} models it must be (n, m), one number for each model")
    flags = None if novel is None else np.asarray(novel, dtype=np.bool_)
    if flags is not None and flags.shape != (n,):
        raise InvalidInput(f"novel must hold one flag for each of {n} prompts, not {flags.shape}")
    paid = None
    if predicted.ndim == 2:
        paid = _ascending(outcomes.cost.mean(axis=0) if prices is None else prices, outcomes)
    rule = DecisionRule(np.inf, m, paid, None if novel is None else range(m)[novel_to])
    return Sweep(rule, predicted, flags, outcomes)


def _between(points: Floats, margin: float) -> Floats:
    """Values between the turning points, and one beyond each end; ascending."""
    distinct = np.unique(points)
    if not len(distinct):
        return distinct
    if len(distinct) > STEPS:
        distinct = np.unique(np.quantile(distinct, np.linspace(0, 1, STEPS)))
    ends = distinct[0] - margin, distinct[-1] + margin
    return np.concatenate([[ends[0]], (distinct[:-1] + distinct[1:]) / 2, [ends[1]]])


def _ascending(prices: ArrayLike, outcomes: Outcomes) -> tuple[float, ...]:
    paid = np.asarray(prices, dtype=np.float64)
    if paid.shape != (len(outcomes.models),) or not np.isfinite(paid).all():
        raise InvalidInput(f"prices must hold one number for each of {len(outcomes.models)} models")
    if (np.diff(paid) <= 0).any():
        shown = ", ".join(f"{m} {p:g}" for m, p in zip(outcomes.models, paid, strict=True))
        raise InvalidInput(
            f"prices: each model must be more expensive than the one before it ({shown})"
        )
    return tuple(paid.tolist())
