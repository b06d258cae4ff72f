"""Baselines that a scorer has to beat, and the oracle as upper bound.

Chance, length and group use next to nothing of a prompt. TF-IDF vectors, with a linear fit or
nearest neighbours, are often as good as larger scorers.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np

from pliant.errors import InvalidInput
from pliant.linear import Linear, logistic, ridge
from pliant.routing.outcomes import Outcomes
from pliant.routing.prompts import text_of
from pliant.routing.scorers.features import TextFeatures, TextSettings
from pliant.routing.scorers.linear import Floats, best, gain_error, together
from pliant.routing.scorers.protocol import Groups, Predictions, Prompts, Scorer, State, gains
from pliant.stats import as_difference

_PRIOR = 10.0
"""The number of prompts that the overall mean counts for in a group's mean."""
_ROWS_IN_MEMORY = 512  # of the table of similarities


class Random(Scorer):
    """A random order, in which the same prompt always has the same place."""

    kind = "random"
    mean: Floats
    seed: int

    def fit(self, train: Outcomes, choice: Outcomes | None = None, seed: int = 0) -> Self:
        self.mean, self.seed = train.right.mean(axis=0), seed
        return self

    def predict(self, prompts: Prompts, groups: Groups = None) -> Predictions:
        place = np.array([_place(text_of(prompt), self.seed) for prompt in prompts])
        right = np.tile(self.mean, (len(place), 1))
        gain = gains(right)
        gain[:, 1:] += 1e-6 * (place[:, None] - 0.5)
        return Predictions(right, gain)

    def state(self) -> State:
        return State({"seed": self.seed}, {"mean": self.mean})

    def load_state(self, state: State) -> None:
        self.seed, self.mean = state.settings["seed"], state.arrays["mean"]


def _place(text: str, seed: int) -> float:
    digest = hashlib.sha256(f"{seed}:{text}".encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


class Length(Scorer):
    """A logistic regression on the logarithm of the number of characters."""

    kind = "length"
    head: Linear

    def fit(self, train: Outcomes, choice: Outcomes | None = None, seed: int = 0) -> Self:
        everything = together(train, choice)
        self.head = logistic(_lengths(everything.prompts), everything.right, c=1.0)
        return self

    def predict(self, prompts: Prompts, groups: Groups = None) -> Predictions:
        right = self.head(_lengths(prompts))
        return Predictions(right, gains(right))

    def state(self) -> State:
        return State(arrays=self.head.arrays())

    def load_state(self, state: State) -> None:
        self.head = Linear.from_arrays(state.arrays, logistic=True)


def _lengths(prompts: Prompts) -> Floats:
    return np.array([[np.log1p(len(text_of(prompt)))] for prompt in prompts])


class Group(Scorer):
    """The mean of the prompt's group, shrunk towards the overall mean if the group is small."""

    kind = "group"
    needs_groups = True
    names: list[str]
    means: Floats
    """(1 + groups, m): the first row is for unknown groups."""

    def fit(self, train: Outcomes, choice: Outcomes | None = None, seed: int = 0) -> Self:
        everything = together(train, choice)
        if everything.groups is None:
            raise InvalidInput("the group scorer needs labels with a group column")
        names, at = np.unique(np.array(everything.groups), return_inverse=True)
        mean = everything.right.mean(axis=0)
        count = np.bincount(at)[:, None]
        total = np.stack([np.bincount(at, column) for column in everything.right.T], axis=1)
        self.names = names.tolist()
        self.means = np.vstack([mean, (total + _PRIOR * mean) / (count + _PRIOR)])
        return self

    def predict(self, prompts: Prompts, groups: Groups = None) -> Predictions:
        at = {name: i + 1 for i, name in enumerate(self.names)}
        rows = [at.get(name, 0) for name in groups] if groups else [0] * len(prompts)
        right = self.means[rows]
        return Predictions(right, gains(right))

    def state(self) -> State:
        return State({"names": self.names}, {"means": self.means})

    def load_state(self, state: State) -> None:
        self.names, self.means = list(state.settings["names"]), state.arrays["means"]


class OnVectors(Scorer):
    """A fit on TF-IDF vectors, one hyperparameter of which is chosen on the choice split."""

    settings: ClassVar[TextSettings]
    tunes: ClassVar[str]
    """The name of the hyperparameter."""
    candidates: ClassVar[tuple[Any, ...]]
    """Its values that are tried."""
    features: TextFeatures
    head: Callable[[Any], Floats]
    """From vectors to (n, m), how likely each model is right."""
    linear: ClassVar[bool] = False
    """Whether that may lie beyond 0 and 1."""

    def __init__(self) -> None:
        self.tuned = self.candidates[1]

    def fit(self, train: Outcomes, choice: Outcomes | None = None, seed: int = 0) -> Self:
        # The vocabulary comes from both splits, the labels from train alone.
        everything = together(train, choice)
        self.features = TextFeatures(self.settings).fit(everything.prompts, seed)
        x, right, n = self._matrix(everything.prompts), everything.right, len(train)
        if choice is not None:

            def error(candidate: Any) -> float:
                fitted = self._solve(x[:n], right[:n], candidate)
                return gain_error(gains(fitted(x[n:])), choice)

            self.tuned, _ = best(self.candidates, error)
        self.head = self._solve(x, right, self.tuned)
        return self

    def predict(self, prompts: Prompts, groups: Groups = None) -> Predictions:
        right = self.head(self._matrix(prompts))
        gain = as_difference(gains(right)) if self.linear else gains(right)
        return Predictions(np.clip(right, 0.0, 1.0), gain)

    def chosen(self) -> dict[str, Any]:
        return {self.tunes: self.tuned}

    def state(self) -> State:
        state = self.features.state()
        state.settings |= self.chosen()
        return state

    def load_state(self, state: State) -> None:
        self.features = TextFeatures.from_state(state)
        self.tuned = state.settings[self.tunes]

    def _matrix(self, prompts: Prompts) -> Any:
        return self.features.matrix(prompts)

    @abstractmethod
    def _solve(self, x: Any, right: Floats, candidate: Any) -> Callable[[Any], Floats]: ...


class Tfidf(OnVectors):
    """Least squares on words and pairs of words: the plainest baseline.

    Least squares is linear in its targets, so the difference of two models' fits is the fit of the
    gain.
    """

    kind = "tfidf"
    settings = TextSettings(shapes=False)
    tunes, candidates = "strength", (3.0, 10.0, 30.0)
    linear = True
    head: Linear

    def state(self) -> State:
        state = super().state()
        state.arrays |= self.head.arrays(weight=np.float32)
        return state

    def load_state(self, state: State) -> None:
        super().load_state(state)
        self.head = Linear.from_arrays(state.arrays, logistic=not self.linear)

    def _solve(self, x: Any, right: Floats, strength: float) -> Linear:
        return ridge(x, right, strength) if self.linear else logistic(x, right, strength)


class TfidfRidge(Tfidf):
    """Tfidf with each digit as 0, and with character n-grams."""

    kind = "tfidf-ridge"
    settings = TextSettings(words=10_000, characters=10_000)


class TfidfLogistic(TfidfRidge):
    """A logistic regression for each model; the gain is the difference of probabilities."""

    kind = "tfidf-logistic"
    candidates = (0.3, 1.0, 3.0)
    linear = False


@dataclass(frozen=True, eq=False)
class Nearest:
    """The weighted mean over the k most similar of `vectors`."""

    vectors: Any
    """(n, features) of the training prompts, sparse, each of length 1."""
    right: Floats
    k: int

    def __call__(self, vectors: Any) -> Floats:
        k, n = min(self.k, len(self.right)), vectors.shape[0]
        right = np.zeros((n, self.right.shape[1]))
        for start in range(0, n, _ROWS_IN_MEMORY):
            near = (vectors[start : start + _ROWS_IN_MEMORY] @ self.vectors.T).toarray()
            which = np.argpartition(-near, k - 1, axis=1)[:, :k]
            weight = np.maximum(np.take_along_axis(near, which, axis=1), 0.0) + 1e-3
            weight /= weight.sum(axis=1, keepdims=True)
            right[start : start + _ROWS_IN_MEMORY] = np.einsum(
                "nk,nkm->nm", weight, self.right[which]
            )
        return np.clip(right, 0.0, 1.0)


class Neighbours(OnVectors):
    """The mean over the k most similar training prompts, weighted by cosine similarity."""

    kind = "knn"
    settings = TextSettings(words=10_000, characters=10_000)
    tunes, candidates = "k", (10, 30, 100)
    head: Nearest

    def state(self) -> State:
        state, vectors = super().state(), self.head.vectors
        state.settings["width"] = vectors.shape[1]
        state.arrays |= {
            "data": vectors.data.astype(np.float16),
            "indices": vectors.indices.astype(np.int32),
            "indptr": vectors.indptr.astype(np.int64),
            "right": self.head.right.astype(np.float32),
        }
        return state

    def load_state(self, state: State) -> None:
        from scipy.sparse import csr_matrix

        super().load_state(state)
        a = state.arrays
        shape = (len(a["indptr"]) - 1, state.settings["width"])
        data = a["data"].astype(np.float32)
        vectors = csr_matrix((data, a["indices"], a["indptr"]), shape=shape)
        self.head = Nearest(vectors, a["right"].astype(np.float64), self.tuned)

    def _matrix(self, prompts: Prompts) -> Any:
        from sklearn.preprocessing import normalize

        return normalize(super()._matrix(prompts).astype(np.float32))

    def _solve(self, x: Any, right: Floats, k: int) -> Nearest:
        return Nearest(x, right, k)


class Oracle(Scorer):
    """Knows who was right on each prompt of the test set: an upper bound, not a router."""

    kind = "oracle"
    saveable = False

    def __init__(self, test: Outcomes | None = None) -> None:
        self._right = dict(zip(test.prompts, test.right, strict=True)) if test else {}

    def fit(self, train: Outcomes, choice: Outcomes | None = None, seed: int = 0) -> Self:
        return self

    def predict(self, prompts: Prompts, groups: Groups = None) -> Predictions:
        try:
            right = np.stack([self._right[text_of(prompt)] for prompt in prompts])
        except KeyError:
            raise InvalidInput("the oracle knows only the prompts that it was made with") from None
        return Predictions(right, gains(right))
