"""A price of cost (lambda): which model is worth the most at it, and where that changes."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Chosen = NDArray[np.int64]


def most_worth(gain: ArrayLike, costs: ArrayLike, price: float) -> Chosen:
    """(n,) the model with the highest gain - price * cost, ties to the cheaper.

    `gain` is (n, m), `costs` (m,) or (n, m). At an infinite price it is the cheapest model, and at
    minus infinity the dearest.
    """
    return worth(gain, costs, price).argmax(axis=1)


def worth(gain: ArrayLike, costs: ArrayLike, price: float) -> Floats:
    """(n, m) gain - price * cost; at an infinite price nothing but the cost counts."""
    predicted = np.asarray(gain, dtype=np.float64)
    paid = np.broadcast_to(np.asarray(costs, dtype=np.float64), predicted.shape)
    found: Floats = predicted - price * paid if np.isfinite(price) else -paid * np.sign(price)
    return found


def turns(gain: Floats, costs: ArrayLike) -> Floats:
    """The prices at which one model overtakes another on a prompt, of all pairs and prompts."""
    paid = np.broadcast_to(np.asarray(costs, dtype=np.float64), gain.shape)
    found = []
    for j in range(gain.shape[1]):
        for k in range(j + 1, gain.shape[1]):
            more, dearer = gain[:, k] - gain[:, j], paid[:, k] - paid[:, j]
            found.append(more[dearer != 0] / dearer[dearer != 0])
    return np.concatenate(found)
