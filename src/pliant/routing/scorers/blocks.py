"""Ridge regression on words, surface, topics, and all products of a topic and a surface feature.

What a long prompt or one full of numbers means for a model depends on what it is about, so that the
products carry much of the signal (`python -m benchmarks.routing_labels`). There are thousands of
them, and they are never written out: the similarity of two prompts in them is the product of their
similarities in topics and in surface.

    strength, predictions = cross_validated(blocks, right, partitions)
    weights = solve(blocks, right, strength)
    weights(other_blocks)                        # (n, m)

Up to DIRECT rows the equations are solved by a Cholesky factor of all similarities, above by
conjugate gradients, which need no more memory than the features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pliant.routing.scorers.protocol import Partitions
from pliant.stats import Floats

STRENGTHS = (1.0, 3.0, 8.0, 20.0, 50.0, 120.0, 300.0)
"""The penalties that are tried: the noise of a label over what the features can explain, so that
one that suits a sample suits all rows."""
DIRECT = 3_000
_PRODUCTS = 2.0
"""The weight of the products; that of the words and of the surface is 1."""


@dataclass(frozen=True, eq=False)
class Blocks:
    """The features of n prompts."""

    words: Any
    """(n, words) sparse, of length 1 at most."""
    dense: Floats
    """(n, d): the surface, and whatever else is known of a prompt."""
    topics: Floats
    """(n, t) of length 1."""
    waves: Floats
    """(n, v): the surface, of length about 1."""

    def __len__(self) -> int:
        return len(self.dense)

    def select(self, rows: NDArray[np.int64]) -> Blocks:
        return Blocks(self.words[rows], self.dense[rows], self.topics[rows], self.waves[rows])

    def similarity(self, other: Blocks) -> Floats:
        """(n, other's n) the inner products of all features."""
        products = (self.topics @ other.topics.T) * (self.waves @ other.waves.T)
        words = (self.words @ other.words.T).toarray()
        similarity: Floats = words + self.dense @ other.dense.T + _PRODUCTS * products
        return similarity

    def combined(self, coefficients: Floats, bias: Floats) -> Weights:
        """The weights whose predictions are sums of similarities to these rows, times (n, m)."""
        products = [
            _PRODUCTS * (self.topics * column[:, None]).T @ self.waves for column in coefficients.T
        ]
        return Weights(
            np.asarray(self.words.T @ coefficients),
            self.dense.T @ coefficients,
            np.stack(products),
            bias,
        )


@dataclass(frozen=True, eq=False)
class Weights:
    """Of each feature, for each of m targets."""

    words: Floats
    """(words, m)"""
    dense: Floats
    """(d, m)"""
    products: Floats
    """(m, t, v)"""
    bias: Floats
    """(m,)"""

    def __post_init__(self) -> None:
        m = self.bias.shape
        dimensions = self.words.ndim, self.dense.ndim, self.products.ndim, self.bias.ndim
        same = self.words.shape[1:] == self.dense.shape[1:] == self.products.shape[:1] == m
        if dimensions != (2, 2, 3, 1) or not same:
            raise ValueError("weights of different numbers of targets")

    def __call__(self, x: Blocks) -> Floats:
        products = [((x.topics @ each) * x.waves).sum(axis=1) for each in self.products]
        linear = np.asarray(x.words @ self.words) + x.dense @ self.dense
        predicted: Floats = linear + np.stack(products, axis=1) + self.bias
        return predicted

    def arrays(self, prefix: str = "") -> dict[str, NDArray[np.float32]]:
        return {f"{prefix}{name}": value.astype(np.float32) for name, value in vars(self).items()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], prefix: str = "") -> Weights:
        names = ("words", "dense", "products", "bias")
        return cls(*(arrays[f"{prefix}{name}"].astype(np.float64) for name in names))


def solve(x: Blocks, y: Floats, strength: float) -> Weights:
    """The ridge regression of y (n, m) on the features, with an intercept."""
    mean = y.mean(axis=0)
    if len(x) <= DIRECT:
        return x.combined(_direct(x.similarity(x), y - mean, strength), mean)
    return x.combined(_iterated(x, y - mean, strength), mean)


def cross_validated(
    x: Blocks, y: Floats, partitions: Partitions, strengths: Sequence[float] = STRENGTHS
) -> tuple[float, Floats]:
    """The strength with the least error, and the out-of-fold predictions (n, m) by it.

    The strength is chosen on the first partition (of more than DIRECT rows, on a sample of so
    many); the predictions are the mean over all of them.
    """
    if len(x) > DIRECT:
        sample = np.sort(np.random.default_rng(0).permutation(len(x))[:DIRECT])
        place = np.full(len(x), -1)
        place[sample] = np.arange(DIRECT)
        folds = [place[fold][place[fold] >= 0] for fold in partitions[0]]
        strength, _ = cross_validated(x.select(sample), y[sample], [folds], strengths)
        each = [_iterated_out_of_fold(x, y, folds, strength) for folds in partitions]
        return strength, np.mean(each, axis=0)
    similar = x.similarity(x)
    tried = {s: _out_of_fold(similar, y, partitions[0], s) for s in strengths}
    strength = min(tried, key=lambda s: _gain_error(tried[s], y))
    rest = [_out_of_fold(similar, y, folds, strength) for folds in partitions[1:]]
    return strength, np.mean([tried[strength], *rest], axis=0)


def out_of_fold(
    x: Blocks, y: Floats, folds: Sequence[NDArray[np.int64]], strength: float
) -> Floats:
    """(n, m) of up to DIRECT rows, each by a fit on the other folds."""
    return _out_of_fold(x.similarity(x), y, folds, strength)


def _gain_error(predicted: Floats, y: Floats) -> float:
    """Of the differences between the targets, and of the target itself if there is one."""
    error = predicted - y
    if error.shape[1] > 1:
        error = error - error.mean(axis=1, keepdims=True)
    return float((error**2).mean())


def _out_of_fold(similar: Floats, y: Floats, folds: Sequence[Any], strength: float) -> Floats:
    # One mean for all folds: the mean of the rest is lower where the fold's is higher, which would
    # order prompts of different folds the wrong way round.
    mean = y.mean(axis=0)
    predicted = np.zeros_like(y)
    for fold in folds:
        rest = np.setdiff1d(np.arange(len(y)), fold)
        coefficients = _direct(similar[np.ix_(rest, rest)], y[rest] - mean, strength)
        predicted[fold] = similar[np.ix_(fold, rest)] @ coefficients + mean
    return predicted


def _iterated_out_of_fold(x: Blocks, y: Floats, folds: Sequence[Any], strength: float) -> Floats:
    mean = y.mean(axis=0)
    predicted = np.zeros_like(y)
    for fold in folds:
        rest = np.setdiff1d(np.arange(len(y)), fold)
        known = x.select(rest)
        weights = known.combined(_iterated(known, y[rest] - mean, strength), mean)
        predicted[fold] = weights(x.select(fold))
    return predicted


def _direct(similar: Floats, y: Floats, strength: float) -> Floats:
    """The coefficients (n, m) of the rows."""
    from scipy.linalg import cho_factor, cho_solve

    penalised = similar.copy()
    penalised[np.diag_indices(len(y))] += strength
    coefficients: Floats = cho_solve(cho_factor(penalised, overwrite_a=True), y)
    return coefficients


def _iterated(x: Blocks, y: Floats, strength: float) -> Floats:
    """The same, to a thousandth of y."""
    from scipy.sparse.linalg import LinearOperator, cg

    n, none = len(y), np.zeros(1)

    def times(vector: Floats) -> Floats:
        column = vector.reshape(n, 1)
        similar: Floats = x.combined(column, none)(x)[:, 0]
        return similar + strength * column[:, 0]

    system = LinearOperator((n, n), matvec=times, dtype=np.float64)
    return np.stack([cg(system, target, rtol=1e-3)[0] for target in y.T], axis=1)
