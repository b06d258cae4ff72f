"""Bags of words: the control that every learned router has to beat, and often does not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import numpy as np

from pliant.routing.outcomes import Outcomes
from pliant.routing.prompts import Prompt
from pliant.routing.scorers.features import TextFeatures, TextSettings
from pliant.routing.scorers.fitting import Linear, best, gain_error, logistic, ridge, together
from pliant.routing.scorers.protocol import Predictions, Scorer, State, over_the_first


class Tfidf(Scorer):
    """Words and pairs of words, as they stand, and least squares: the plain control.

    Least squares is linear in its targets, so the difference of the models' fits is the fit of the
    gain itself.
    """

    kind = "tfidf"
    settings: ClassVar[TextSettings] = TextSettings(shapes=False)
    strengths: ClassVar[tuple[float, ...]] = (3.0, 10.0, 30.0)
    """What the penalty is chosen among."""

    def __init__(self) -> None:
        self.features = TextFeatures(self.settings)
        self.strength = self.strengths[1]
        self.head: Linear | None = None

    def fit(self, train: Outcomes, choice: Outcomes | None = None, seed: int = 0) -> Self:
        # The words of both splits, and the labels of one: a capacity is judged by labels alone.
        everything = together(train, choice)
        self.features = TextFeatures(self.settings).fit(everything.prompts, seed)
        x, right = self.features.matrix(everything.prompts), everything.right
        if choice is not None:
            n = len(train)

            def error(strength: float) -> float:
                fitted = self._solve(x[:n], right[:n], strength)
                return gain_error(over_the_first(fitted(x[n:])), choice)

            self.strength, _ = best(self.strengths, error)
        self.head = self._solve(x, right, self.strength)
        return self

    def predict(
        self, prompts: Sequence[Prompt], groups: Sequence[str] | None = None
    ) -> Predictions:
        assert self.head is not None, "not fitted"
        found = self.head(self.features.matrix(prompts))
        return Predictions(np.clip(found, 0.0, 1.0), over_the_first(found))

    def chosen(self) -> dict[str, Any]:
        return {"strength": self.strength}

    def state(self) -> State:
        assert self.head is not None, "not fitted"
        state = self.features.state()
        state.settings["strength"] = self.strength
        state.arrays["weight"] = self.head.weight.astype(np.float32)
        state.arrays["bias"] = self.head.bias
        return state

    def take(self, state: State) -> None:
        self.features = TextFeatures.of(state)
        self.strength = state.settings["strength"]
        weight = state.arrays["weight"].astype(np.float64)
        self.head = Linear(weight, state.arrays["bias"], self.logistic)

    logistic: ClassVar[bool] = False

    def _solve(self, x: Any, right: Any, strength: float) -> Linear:
        return ridge(x, right, strength)


class TfidfRidge(Tfidf):
    """The same with the shapes of numbers in place of the numbers, and with runs of characters."""

    kind = "tfidf-ridge"
    settings = TextSettings(words=10_000, characters=10_000)


class TfidfLogistic(TfidfRidge):
    """One logistic regression a model; the gain is the difference of their probabilities."""

    kind = "tfidf-logistic"
    strengths = (0.3, 1.0, 3.0)
    logistic = True

    def _solve(self, x: Any, right: Any, strength: float) -> Linear:
        return logistic(x, right, strength)
