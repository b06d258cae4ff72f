"""Which model answers a prompt: the one rule that fitting, evaluating and the live router share.

    rule = DecisionRule(0.2, models=2, novel_to=1)
    rule.choose(gains, novel)        # (n,) the index of the model that answers each prompt
    rule.preference(gains[0])        # that model first, then those that stand in for it

Novel prompts, those unlike the prompts that the router was fitted on, go to one fixed model. Every
other prompt is decided by its predicted gains, in one of two ways:

- Without `prices`: the last of two models answers where its gain is above `value`, strictly.
- With `prices`: the model with the highest gain - value * price answers; of equals, the cheapest.

Models are in the order of their strength, the strongest last, whatever they cost. The lower the
value, the less counts what an answer costs: at 0 the gain alone decides, and below 0 each model is
preferred by its place, up to the strongest for every prompt. `sweep` tries every value on a split.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pliant.errors import InvalidInput
from pliant.routing.outcomes import Outcomes
from pliant.stats import Floats

Chosen = NDArray[np.int64]
STEPS = 1000
"""At most so many prices are tried."""


@dataclass(frozen=True)
class DecisionRule:
    """From predicted gains and novel flags to models, given as indices, the strongest last."""

    value: float
    """The threshold, or the price of a unit of cost. -inf prefers the last model; inf the first, or
    with `prices` the cheapest."""
    models: int
    """How many there are."""
    prices: tuple[float, ...] | Floats | None = None
    """The expected cost of an answer of each model, (m,) or (n, m) by prompt; None compares the
    last gain with `value`."""
    novel_to: int | None = None
    """The model that answers novel prompts; None decides on them by their gains as well."""

    def choose(self, gain: ArrayLike, novel: ArrayLike | None = None) -> Chosen:
        """(n,) the model that answers each prompt.

        `gain` is (n, m) over the first model, or (n,) of the last one where there are no prices;
        `novel` (n,) flags, or None where novelty was not computed.
        """
        predicted = np.asarray(gain, dtype=np.float64)
        if self.prices is None:
            last = predicted if predicted.ndim == 1 else predicted[:, -1]
            chosen = np.where(last > self.value, self.models - 1, 0)
        else:
            chosen = self._ordered(predicted)[:, 0]
        if novel is None or self.novel_to is None:
            return chosen
        return np.where(np.asarray(novel, dtype=np.bool_), self.novel_to, chosen)

    def preference(self, gain: ArrayLike, novel: bool = False) -> tuple[int, ...]:
        """All models for one prompt with gains (m,): the chosen one first, then its substitutes.

        The fixed model for novel prompts is followed by the others, the strongest first.
        """
        gains = np.asarray(gain, dtype=np.float64)[None]
        if novel and self.novel_to is not None:
            return tuple(dict.fromkeys([self.novel_to, *reversed(range(self.models))]))
        if self.prices is None:
            return (self.models - 1, 0) if self.choose(gains)[0] else (0, self.models - 1)
        return tuple(self._ordered(gains)[0].tolist())

    def is_upgrade(self, gain: ArrayLike, chosen: int, current: int) -> bool:
        """Whether this model is preferred to the current one for more than its price, on a prompt
        with gains (m,)."""
        if self.prices is None:
            return chosen > current
        # A value below 0 is a bonus for strength, so it counts.
        gains = np.asarray(gain, dtype=np.float64)[None]
        net = net_gain(gains, self.prices, min(self.value, 0.0))[0]
        return bool(net[chosen] > net[current])

    def _ordered(self, gain: Floats) -> NDArray[np.int64]:
        """(n, m) the models by their net gain, the highest first; of equals, the cheapest."""
        assert self.prices is not None
        paid = np.broadcast_to(np.asarray(self.prices, dtype=np.float64), gain.shape)
        return np.lexsort((paid, -net_gain(gain, paid, self.value)), axis=1)


def net_gain(gain: ArrayLike, prices: ArrayLike, value: float) -> Floats:
    """(n, m) gain - value * price, prices (m,) or (n, m). Below 0 a value is a bonus for strength:
    then the highest price stands for the strongest model, and so on down.

    At infinity the price decides, and the gain between equal prices; at -infinity the strength.
    """
    predicted = np.asarray(gain, dtype=np.float64)
    paid = np.broadcast_to(np.asarray(prices, dtype=np.float64), predicted.shape)
    if np.isfinite(value):
        return np.asarray(predicted - value * (paid if value > 0 else np.sort(paid, axis=1)))
    apart = 2 * np.abs(predicted).max(initial=0.0) + 1
    if value < 0:
        return np.asarray(predicted + apart * np.arange(predicted.shape[1]))
    cheaper = (paid[:, None, :] < paid[:, :, None]).sum(axis=2)
    return np.asarray(predicted - apart * cheaper)


def turning_points(gain: Floats, prices: ArrayLike) -> Floats:
    """The values at which one model overtakes another on a prompt, of all pairs and prompts."""
    paid = np.broadcast_to(np.asarray(prices, dtype=np.float64), gain.shape)
    above, below = _crossings(gain, paid), _crossings(gain, np.sort(paid, axis=1))
    return np.concatenate([above[above > 0], below[below <= 0]])


def _crossings(gain: Floats, paid: Floats) -> Floats:
    points = []
    for j in range(gain.shape[1]):
        for k in range(j + 1, gain.shape[1]):
            more, extra = gain[:, k] - gain[:, j], paid[:, k] - paid[:, j]
            points.append(more[extra != 0] / extra[extra != 0])
    return np.concatenate(points)


@dataclass(frozen=True, eq=False)
class Steps:
    """The distinct values on a split, descending: of models whose prices ascend with their
    strength, from the fewest calls to the strongest to the most."""

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
        spread = 0.0 if self.rule.prices is None else float(np.ptp(self.rule.prices))
        return 1 / spread if spread > 0 else 1.0

    @cached_property
    def steps(self) -> Steps:
        by_gain = self.novel is None or ~self.novel
        gain = self.gain if self.novel is None else self.gain[by_gain]
        if self.rule.prices is None:
            return self._gain_steps(gain, by_gain)
        values = _between(turning_points(gain, self.rule.prices), self.unit_gain)
        return self._at(np.concatenate([[np.inf], values[::-1], [-np.inf]]))

    def _at(self, values: Floats) -> Steps:
        choices = [self.choose(float(value)) for value in values]
        routed = [self.outcomes.routed(chosen) for chosen in choices]
        return Steps(
            values,
            np.array([(chosen == self.rule.models - 1).mean() for chosen in choices]),
            np.array([right.mean() for right, _ in routed]),
            np.array([cost.mean() for _, cost in routed]),
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
    novel_to: int | None = -1,
) -> Sweep:
    """The sweep over predictions (n,), or (n, m) with the price of each model's answer.

    Prompts flagged as `novel` go to the model `novel_to` at every value; None decides on them by
    their gains as well.
    """
    outcomes.refuse_incomplete("a threshold is chosen by who was right")
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
    home = None if novel is None or novel_to is None else range(m)[novel_to]
    flags = None if home is None else np.asarray(novel, dtype=np.bool_)
    if flags is not None and flags.shape != (n,):
        raise InvalidInput(f"novel must hold one flag for each of {n} prompts, not {flags.shape}")
    paid = None
    if predicted.ndim == 2:
        paid = _checked(outcomes.cost.mean(axis=0) if prices is None else prices, outcomes)
    return Sweep(DecisionRule(np.inf, m, paid, home), predicted, flags, outcomes)


def _between(points: Floats, margin: float) -> Floats:
    """Values between the turning points, and one beyond each end; ascending."""
    distinct = np.unique(points)
    if not len(distinct):
        return distinct
    if len(distinct) > STEPS:
        distinct = np.unique(np.quantile(distinct, np.linspace(0, 1, STEPS)))
    ends = distinct[0] - margin, distinct[-1] + margin
    return np.concatenate([[ends[0]], (distinct[:-1] + distinct[1:]) / 2, [ends[1]]])


def _checked(prices: ArrayLike, outcomes: Outcomes) -> tuple[float, ...]:
    paid = np.asarray(prices, dtype=np.float64)
    if paid.shape != (len(outcomes.models),) or not np.isfinite(paid).all():
        raise InvalidInput(f"prices must hold one number for each of {len(outcomes.models)} models")
    return tuple(paid.tolist())
