"""Baselines that a scorer has to beat (chance, length, group), and the oracle as upper bound."""

from __future__ import annotations

import hashlib
from typing import Self

import numpy as np

from pliant.errors import InvalidInput
from pliant.routing.outcomes import Outcomes
from pliant.routing.prompts import text_of
from pliant.routing.scorers.linear import Floats, Linear, logistic, together
from pliant.routing.scorers.protocol import Groups, Predictions, Prompts, Scorer, State, gains

_PRIOR = 10.0
"""The number of prompts that the overall mean counts for in a group's mean."""


class Random(Scorer):
    """A random order, in which the same prompt always has the same place."""

    kind = "random"

    def __init__(self) -> None:
        self.mean: Floats = np.zeros(0)
        self.seed = 0

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

    def __init__(self) -> None:
        self.head: Linear | None = None

    def fit(self, train: Outcomes, choice: Outcomes | None = None, seed: int = 0) -> Self:
        everything = together(train, choice)
        self.head = logistic(_lengths(everything.prompts), everything.right, c=1.0)
        return self

    def predict(self, prompts: Prompts, groups: Groups = None) -> Predictions:
        assert self.head is not None, "not fitted"
        right = self.head(_lengths(prompts))
        return Predictions(right, gains(right))

    def state(self) -> State:
        assert self.head is not None, "not fitted"
        return State(arrays=self.head.arrays())

    def load_state(self, state: State) -> None:
        self.head = Linear.from_arrays(state.arrays, logistic=True)


def _lengths(prompts: Prompts) -> Floats:
    return np.array([[np.log1p(len(text_of(prompt)))] for prompt in prompts])


class Group(Scorer):
    """The mean of the prompt's group, shrunk towards the overall mean if the group is small."""

    kind = "group"
    needs_groups = True

    def __init__(self) -> None:
        self.names: list[str] = []
        self.means: Floats = np.zeros((0, 0))
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


class Oracle(Scorer):
    """Knows who was right on each prompt of the test set: an upper bound, not a router."""

    kind = "oracle"
    saveable = False

    def __init__(self, test: Outcomes | None = None) -> None:
        self._right: dict[str, Floats] = {}
        for text, right in zip(*((test.prompts, test.right) if test else ((), ())), strict=True):
            self._right[text] = right

    def fit(self, train: Outcomes, choice: Outcomes | None = None, seed: int = 0) -> Self:
        return self

    def predict(self, prompts: Prompts, groups: Groups = None) -> Predictions:
        try:
            right = np.stack([self._right[text_of(prompt)] for prompt in prompts])
        except KeyError:
            raise InvalidInput("the oracle knows only the prompts that it was made with") from None
        return Predictions(right, gains(right))
