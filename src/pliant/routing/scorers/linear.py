"""The linear fits behind scorers: ridge, logistic regression, folds, the best hyperparameter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from pliant.data import splits
from pliant.routing.outcomes import Outcomes
from pliant.stats import Floats, logit, sigmoid

Candidate = TypeVar("Candidate")


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
        cls, arrays: Mapping[str, Any], prefix: str = "", logistic: bool = False
    ) -> Self:
        weight, bias = arrays[f"{prefix}weight"], arrays[f"{prefix}bias"]
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


def folds(outcomes: Outcomes, number: int, seed: int) -> list[NDArray[np.int64]]:
    """The rows of each fold; prompts with the same text or question share a fold."""
    parts = splits(len(outcomes), [1 / number] * number, seed, outcomes.inseparable())
    return [np.asarray(part, dtype=np.int64) for part in parts if part]


def out_of_fold(
    x: Any, y: Floats, parts: Sequence[NDArray[np.int64]], fit: Callable[[Any, Floats], Linear]
) -> Floats:
    """The prediction for each row, by a fit on the other folds."""
    predictions = np.zeros_like(y)
    for part in parts:
        rest = np.setdiff1d(np.arange(len(y)), part)
        predictions[part] = fit(x[rest], y[rest])(x[part])
    return predictions


def gain_error(gain: Floats, outcomes: Outcomes) -> float:
    """The mean squared error of predicted gains, by which hyperparameters are chosen."""
    true = outcomes.right[:, 1:] - outcomes.right[:, :1]
    return float(np.mean((gain[:, 1:] - true) ** 2))


def best(
    candidates: Sequence[Candidate], error: Callable[[Candidate], float]
) -> tuple[Candidate, dict[str, float]]:
    """The candidate with the smallest error, and the error of each."""
    errors = [error(candidate) for candidate in candidates]
    table = {str(candidate): value for candidate, value in zip(candidates, errors, strict=True)}
    return candidates[int(np.argmin(errors))], table


def together(train: Outcomes, choice: Outcomes | None) -> Outcomes:
    """Both splits as one, for the last fit: once the choice is made, all rows can be used."""
    return train if choice is None else joined((train, choice))


def joined(parts: Sequence[Outcomes]) -> Outcomes:
    """The rows of several tables with the same models."""
    first = parts[0]
    assert all(part.models == first.models and part.unit == first.unit for part in parts)

    def texts(name: str) -> tuple[str, ...] | None:
        columns = [getattr(part, name) for part in parts]
        return None if any(c is None for c in columns) else tuple(t for c in columns for t in c)

    messages = tuple(m for part in parts for m in part.messages or (None,) * len(part))
    columns: Any = {name: texts(name) for name in ("prompts", "groups", "wordings", "questions")}
    return replace(
        first,
        right=np.concatenate([part.right for part in parts]),
        cost=np.concatenate([part.cost for part in parts]),
        messages=messages if any(messages) else None,
        **columns,
    )
