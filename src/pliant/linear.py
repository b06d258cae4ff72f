"""Linear fits: ridge and logistic regression, by scikit-learn, as two arrays that are saved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from pliant.stats import Floats, logit, sigmoid


@dataclass(frozen=True, eq=False)
class Linear:
    """x @ weight + bias for each target, through a sigmoid if it is logistic."""

    weight: Floats
    """(features, targets)"""
    bias: Floats
    logistic: bool = False

    def __call__(self, x: Any) -> Floats:
        out: Floats = np.asarray(x @ self.weight) + self.bias
        return sigmoid(out) if self.logistic else out

    def arrays(self, prefix: str = "", weight: type = np.float64) -> dict[str, NDArray[Any]]:
        """To save: the weight in the precision `weight`, the bias as it is."""
        return {f"{prefix}weight": self.weight.astype(weight), f"{prefix}bias": self.bias}

    @classmethod
    def from_arrays(
        cls,
        arrays: Mapping[str, Any],
        prefix: str = "",
        logistic: bool = False,
        features: int | None = None,
    ) -> Self:
        """What `arrays` wrote, of so many features; ValueError if it can be none."""
        weight, bias = arrays[f"{prefix}weight"], arrays[f"{prefix}bias"]
        rows = weight.shape[0] if features is None and weight.ndim == 2 else features
        if weight.shape != (rows, len(bias)) or bias.ndim != 1:
            raise ValueError(f"a weight of {weight.shape} beside a bias of {bias.shape}")
        if weight.dtype.kind != "f" or bias.dtype.kind != "f":
            raise ValueError(f"a weight of {weight.dtype} and a bias of {bias.dtype}")
        return cls(weight.astype(np.float64), bias.astype(np.float64), logistic)


def ridge(x: Any, y: Floats, alpha: float) -> Linear:
    """Ridge regression; each column of `y` is a target."""
    from scipy.sparse import issparse
    from sklearn.linear_model import Ridge

    solver = {"solver": "sparse_cg", "tol": 1e-3} if issparse(x) else {}
    fitted = Ridge(alpha=alpha, **solver).fit(x, y)
    return Linear(np.atleast_2d(fitted.coef_).T, np.atleast_1d(fitted.intercept_))


def logistic(x: Any, y: Floats, c: float) -> Linear:
    """One logistic regression for each column of `y`, whose entries may be shares."""
    from sklearn.linear_model import LogisticRegression

    weights, biases = [], []
    for target in y.T:
        rows, labels, weight = _as_labels(target)
        if len(set(labels.tolist())) < 2:  # always right or never right
            weights.append(np.zeros(x.shape[1]))
            biases.append(float(logit(target.mean(), 1e-3)))
            continue
        fitted = LogisticRegression(C=c, max_iter=200, tol=1e-3)
        fitted.fit(x[rows], labels, sample_weight=weight)
        weights.append(fitted.coef_[0])
        biases.append(float(fitted.intercept_[0]))
    return Linear(np.stack(weights, axis=1), np.asarray(biases), logistic=True)


def _as_labels(share: Floats) -> tuple[NDArray[np.int64], NDArray[np.int64], Floats]:
    """A share y is a 1 of weight y and a 0 of weight 1 - y."""
    rows = np.concatenate([np.flatnonzero(share > 0), np.flatnonzero(share < 1)])
    labels = np.concatenate([np.ones((share > 0).sum()), np.zeros((share < 1).sum())])
    weight = np.concatenate([share[share > 0], 1 - share[share < 1]])
    return rows, labels.astype(np.int64), weight
