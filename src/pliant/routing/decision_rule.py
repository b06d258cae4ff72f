"""Which model answers a prompt: the one rule that fitting, evaluating and the live router share.

    rule = DecisionRule(0.2, models=2, novel_to=1)
    rule.choose(gains, novel)        # (n,) the index of the model that answers each prompt
    rule.preference(gains[0])        # that model first, then those that stand in for it

Novel prompts, those unlike the prompts that the router was fitted on, go to one fixed model. Every
other prompt is decided by its predicted gains, in one of two ways:

- Without `prices`: the last of two models answers where its gain is above `value`, strictly.
- With `prices`: the model with the highest gain - value * price answers; of equals, the cheapest.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Chosen = NDArray[np.int64]


@dataclass(frozen=True)
class DecisionRule:
    """From predicted gains and novel flags to models, given as indices, the cheapest first."""

    value: float
    """The threshold, or the price of a unit of cost. -inf prefers the last model, inf the first."""
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
            chosen = net_gain(predicted, self.prices, self.value).argmax(axis=1)
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
        # The sort is stable, so that of equals the cheaper model stays first.
        order = np.argsort(-net_gain(gains, self.prices, self.value)[0], kind="stable")
        return tuple(order.tolist())


def net_gain(gain: ArrayLike, prices: ArrayLike, value: float) -> Floats:
    """(n, m) gain - value * price, prices (m,) or (n, m); at an infinite value the price alone."""
    predicted = np.asarray(gain, dtype=np.float64)
    paid = np.broadcast_to(np.asarray(prices, dtype=np.float64), predicted.shape)
    return np.asarray(predicted - value * paid if np.isfinite(value) else -paid * np.sign(value))


def turning_points(gain: Floats, prices: ArrayLike) -> Floats:
    """The values at which one model overtakes another on a prompt, of all pairs and prompts."""
    paid = np.broadcast_to(np.asarray(prices, dtype=np.float64), gain.shape)
    points = []
    for j in range(gain.shape[1]):
        for k in range(j + 1, gain.shape[1]):
            more, extra = gain[:, k] - gain[:, j], paid[:, k] - paid[:, j]
            points.append(more[extra != 0] / extra[extra != 0])
    return np.concatenate(points)
