"""How far prompts are from stored ones: by their words, by their surface, by given vectors.

Words are hashed, so that a word that no stored prompt has still counts: a vocabulary would drop
it, and what is left of a sentence in unknown words would look familiar.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from pliant.routing.scorers.features import hashed_counts, surface
from pliant.stats import Floats

_BUCKETS = 2**16
_CLIP = 8.0
"""In standard deviations: no single feature may outweigh all others."""


class Space(Protocol):
    """Stored prompts, and the distance of others from them."""

    @property
    def stored(self) -> int:
        """How many there are."""

    def distances(self, prompts: Any) -> Floats:
        """(n, stored)"""

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What `from_arrays` needs."""


@dataclass(frozen=True, eq=False)
class Words:
    """Cosine distance of TF-IDF vectors of hashed words and pairs of words, each digit as 0."""

    idf: NDArray[np.float32]
    vectors: Any
    """(stored, buckets), sparse, each row of length 1 or 0."""

    @classmethod
    def fit(cls, texts: Sequence[str], stored: NDArray[np.int64]) -> Self:
        """Weights from all texts, vectors of the stored ones."""
        counts = hashed_counts(texts, _BUCKETS)
        frequency = np.bincount(counts.indices, minlength=_BUCKETS)
        idf = _as_saved(np.log((1 + len(texts)) / (1 + frequency)) + 1)
        vectors = _weighted(counts[stored], idf)
        vectors.data = _as_saved(vectors.data)
        return cls(idf, vectors)

    @property
    def stored(self) -> int:
        return int(self.vectors.shape[0])

    def distances(self, prompts: Sequence[str]) -> Floats:
        similarity = _weighted(hashed_counts(prompts, _BUCKETS), self.idf) @ self._columns
        return 1.0 - np.asarray(similarity.toarray(), dtype=np.float64)

    @cached_property
    def _columns(self) -> Any:
        return self.vectors.T.tocsr()  # by bucket: one prompt reads only those of its own words

    def arrays(self) -> dict[str, NDArray[Any]]:
        return {
            "idf": self.idf.astype(np.float16),
            "data": self.vectors.data.astype(np.float16),
            "indices": self.vectors.indices.astype(np.uint16),
            "indptr": self.vectors.indptr.astype(np.int64),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Self:
        from scipy.sparse import csr_matrix

        data, indices = arrays["data"], arrays["indices"]
        indptr = arrays["indptr"].astype(np.int64)
        if (
            arrays["idf"].shape != (_BUCKETS,)
            or data.ndim != 1
            or indices.dtype != np.uint16
            or indices.shape != data.shape
            or indptr.ndim != 1
            or not len(indptr)
            or indptr[0] != 0
            or indptr[-1] != len(data)
            or (np.diff(indptr) < 0).any()
        ):
            raise ValueError("the words of its prompts are no sparse rows")
        parts = (data.astype(np.float32), indices.astype(np.int32), indptr)
        vectors = csr_matrix(parts, shape=(len(indptr) - 1, _BUCKETS))
        return cls(arrays["idf"].astype(np.float32), vectors)


def _as_saved(values: NDArray[Any]) -> NDArray[np.float32]:
    """Rounded as in the file, so that a loaded detector decides as the fitted one did."""
    return values.astype(np.float16).astype(np.float32)


def _weighted(counts: Any, idf: NDArray[np.float32]) -> Any:
    """Logarithms of the counts times the weights, each row of length 1."""
    from sklearn.preprocessing import normalize

    counts = counts.copy()
    counts.data = (1 + np.log(counts.data)) * idf[counts.indices]
    return normalize(counts, copy=False)


@dataclass(frozen=True, eq=False)
class Surface:
    """Euclidean distance of the standardised lengths and shares of `features.surface`."""

    mean: Floats
    std: Floats
    points: Floats
    """(stored, features)"""

    @classmethod
    def fit(cls, texts: Sequence[str], stored: NDArray[np.int64]) -> Self:
        raw = np.array([surface(text) for text in texts])
        mean, std = raw.mean(axis=0), raw.std(axis=0)
        # A constant feature has no scale: its rounding errors would dominate all others.
        std = np.where(std > 1e-6, std, 1.0)
        return cls(mean, std, _standardised(raw[stored], mean, std))

    @property
    def stored(self) -> int:
        return len(self.points)

    def distances(self, prompts: Sequence[str]) -> Floats:
        raw = np.array([surface(text) for text in prompts])
        here = _standardised(raw, self.mean, self.std)
        squares = (here**2).sum(axis=1)[:, None] + (self.points**2).sum(axis=1)
        return np.sqrt(np.maximum(squares - 2 * here @ self.points.T, 0.0))

    def arrays(self) -> dict[str, NDArray[Any]]:
        return {"mean": self.mean, "std": self.std, "points": self.points}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Self:
        mean, std, points = arrays["mean"], arrays["std"], arrays["points"]
        width = len(surface(""))
        if mean.shape != (width,) or std.shape != (width,) or points.shape[1:] != (width,):
            raise ValueError(f"a surface has {width} numbers")
        if not (std > 0).all():
            raise ValueError("a standard deviation of 0")
        return cls(mean, std, points)


def _standardised(raw: Floats, mean: Floats, std: Floats) -> Floats:
    return np.clip((raw - mean) / std, -_CLIP, _CLIP)


@dataclass(frozen=True, eq=False)
class Vectors:
    """Cosine distance of vectors that a scorer computes: sentence embeddings, a model's states."""

    points: Floats
    """(stored, width), each of length 1."""

    @classmethod
    def fit(cls, vectors: Floats, stored: NDArray[np.int64]) -> Self:
        return cls(_as_saved(_unit(vectors)[stored]).astype(np.float64))

    @property
    def stored(self) -> int:
        return len(self.points)

    def distances(self, prompts: Floats) -> Floats:
        return 1.0 - _unit(prompts) @ self.points.T

    def arrays(self) -> dict[str, NDArray[Any]]:
        return {"points": self.points.astype(np.float16)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Self:
        if arrays["points"].ndim != 2:
            raise ValueError("no table of vectors")
        return cls(arrays["points"].astype(np.float64))


def _unit(vectors: Floats) -> Floats:
    x = np.asarray(vectors, dtype=np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
