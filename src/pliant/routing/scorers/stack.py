"""The second storey of a stack: from what fits say out of fold to who will be right.

Where the cheap model fails there is something to gain only if the dear one does not fail as well,
so the gain is no straight line in the chances of the two: products of them are due.
"""

from __future__ import annotations

from itertools import combinations_with_replacement

import numpy as np
from numpy.typing import NDArray

from pliant.routing.scorers.fitting import Linear, logistic, ridge
from pliant.routing.scorers.protocol import Predictions, State

Floats = NDArray[np.float64]


class Stack:
    """Least squares for the gains and a logistic regression for the chances, on products."""

    def __init__(self) -> None:
        self.mean: Floats = np.zeros(0)
        self.std: Floats = np.zeros(0)
        self.gain: Linear | None = None
        self.right: Linear | None = None

    def fit(self, said: Floats, right: Floats) -> Stack:
        """`said` (n, k) out of fold, or of rows that no fit has seen; `right` (n, m)."""
        x = products(said)
        self.mean, self.std = x.mean(axis=0), x.std(axis=0) + 1e-6
        z = (x - self.mean) / self.std
        self.gain = ridge(z, right[:, 1:] - right[:, :1], alpha=1.0)
        self.right = logistic(z, right, c=1.0)
        return self

    def __call__(self, said: Floats) -> Predictions:
        assert self.gain is not None and self.right is not None, "not fitted"
        z = (products(said) - self.mean) / self.std
        gain = self.gain(z)
        return Predictions(self.right(z), np.hstack([np.zeros((len(gain), 1)), gain]))

    def state(self) -> State:
        assert self.gain is not None and self.right is not None, "not fitted"
        arrays = {"stack.mean": self.mean, "stack.std": self.std}
        for name, head in (("gain", self.gain), ("right", self.right)):
            arrays |= {f"stack.{name}.weight": head.weight, f"stack.{name}.bias": head.bias}
        return State(arrays=arrays)

    @classmethod
    def of(cls, state: State) -> Stack:
        found, a = cls(), state.arrays
        found.mean, found.std = a["stack.mean"], a["stack.std"]
        found.gain = Linear(a["stack.gain.weight"], a["stack.gain.bias"])
        found.right = Linear(a["stack.right.weight"], a["stack.right.bias"], logistic=True)
        return found


def products(x: Floats) -> Floats:
    """The columns, their squares and the products of any two."""
    pairs = combinations_with_replacement(range(x.shape[1]), 2)
    return np.hstack([x, *(x[:, [i]] * x[:, [j]] for i, j in pairs)])
