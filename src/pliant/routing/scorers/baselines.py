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
from pliant.routing.scorers.features import Words
from pliant.routing.scorers.linear import Floats, gain_error, one_partition, together
from pliant.routing.scorers.protocol import (
    Folds,
    Groups,
    Partitions,
    Predictions,
    Prompts,
    Scorer,
    State,
    gains,
)
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
        return Predictions(right, as_difference(gain))

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
        self.head = Linear.from_arrays(state.arrays, logistic=True, features=1)


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


class OnWords(Scorer):
    """A fit on TF-IDF vectors, one hyperparameter of which is chosen by cross-validation."""

    tunes: ClassVar[str]
    """The name of the hyperparameter."""
    candidates: ClassVar[tuple[Any, ...]]
    """Its values that are tried."""
    words: Words
    head: Callable[[Any], Floats]
    """From vectors to (n, m), how likely each model is right."""

    def __init__(self) -> None:
        self.tuned: Any = None
        """The chosen value; None before that."""
        self._prepared: tuple[Outcomes, Any] | None = None

    def cross_validate(
        self, outcomes: Outcomes, partitions: Partitions, seed: int = 0
    ) -> Predictions:
        x, right = self._prepare(outcomes), outcomes.right
        self._prepared = outcomes, x
        tried = {c: self._by_folds(x, right, partitions[0], c) for c in self.candidates}
        self.tuned = min(tried, key=lambda c: gain_error(gains(tried[c]), outcomes))
        rest = [self._by_folds(x, right, folds, self.tuned) for folds in partitions[1:]]
        return _predictions(np.mean([tried[self.tuned], *rest], axis=0))

    def fit(self, train: Outcomes, choice: Outcomes | None = None, seed: int = 0) -> Self:
        everything = together(train, choice)
        if self.tuned is None:
            self.cross_validate(everything, one_partition(everything, seed), seed)
        before, self._prepared = self._prepared, None
        x = before[1] if before and before[0] is everything else self._prepare(everything)
        self.head = self._solve(x, everything.right, self.tuned)
        return self

    def predict(self, prompts: Prompts, groups: Groups = None) -> Predictions:
        return _predictions(self.head(self._vectors(prompts)))

    def chosen(self) -> dict[str, Any]:
        return {self.tunes: self.tuned}

    def state(self) -> State:
        state = self.words.state()
        state.settings |= self.chosen()
        return state

    def load_state(self, state: State) -> None:
        if "shapes" not in state.settings:
            raise InvalidInput(f"a {self.kind} scorer of an older Pliant: fit the router again")
        self.words = Words.from_state(state)
        self.tuned = state.settings[self.tunes]

    def _prepare(self, outcomes: Outcomes) -> Any:
        """The vectors of the training prompts, whose words are all that are used from then on."""
        self.words = self._new_words().fit([text_of(prompt) for prompt in outcomes.prompts])
        return self._vectors(outcomes.prompts)

    def _new_words(self) -> Words:
        return Words()

    def _vectors(self, prompts: Prompts) -> Any:
        return self.words([text_of(prompt) for prompt in prompts])

    def _by_folds(self, x: Any, right: Floats, folds: Folds, candidate: Any) -> Floats:
        predicted = np.zeros_like(right)
        for fold in folds:
            rest = np.setdiff1d(np.arange(len(right)), fold)
            shift = right.mean(axis=0) - right[rest].mean(axis=0)
            predicted[fold] = self._solve(x[rest], right[rest], candidate)(x[fold]) + shift
        return predicted

    @abstractmethod
    def _solve(self, x: Any, right: Floats, candidate: Any) -> Callable[[Any], Floats]: ...


def _predictions(right: Floats) -> Predictions:
    return Predictions(np.clip(right, 0.0, 1.0), as_difference(gains(right)))


class Tfidf(OnWords):
    """Least squares on words and pairs of words: the plainest baseline.

    Least squares is linear in its targets, so the difference of two models' fits is the fit of the
    gain.
    """

    kind = "tfidf"
    tunes, candidates = "strength", (1.5, 5.0, 15.0, 50.0)
    head: Linear

    def state(self) -> State:
        state = super().state()
        state.arrays |= self.head.arrays(weight=np.float32)
        return state

    def load_state(self, state: State) -> None:
        super().load_state(state)
        self.head = Linear.from_arrays(state.arrays)

    def _new_words(self) -> Words:
        return Words(shapes=False)

    def _solve(self, x: Any, right: Floats, strength: float) -> Linear:
        return ridge(x, right, strength)


@dataclass(frozen=True, eq=False)
class Nearest:
    """The weighted mean over the k most similar of `vectors`."""

    vectors: Any
    """(n, features) of the training prompts, sparse or dense, of length 1 at most."""
    right: Floats
    k: int

    def __call__(self, vectors: Any) -> Floats:
        from scipy.sparse import issparse

        k, n = min(self.k, len(self.right)), vectors.shape[0]
        right = np.zeros((n, self.right.shape[1]))
        for start in range(0, n, _ROWS_IN_MEMORY):
            near = vectors[start : start + _ROWS_IN_MEMORY] @ self.vectors.T
            near = near.toarray() if issparse(near) else near
            which = np.argpartition(-near, k - 1, axis=1)[:, :k]
            weight = np.maximum(np.take_along_axis(near, which, axis=1), 0.0) + 1e-3
            weight /= weight.sum(axis=1, keepdims=True)
            right[start : start + _ROWS_IN_MEMORY] = np.einsum(
                "nk,nkm->nm", weight, self.right[which]
            )
        return np.clip(right, 0.0, 1.0)


class Neighbours(OnWords):
    """The mean over the k most similar training prompts, weighted by cosine similarity."""

    kind = "knn"
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

    def _vectors(self, prompts: Prompts) -> Any:
        return super()._vectors(prompts).astype(np.float32)

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
