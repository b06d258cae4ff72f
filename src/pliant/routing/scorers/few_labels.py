"""A scorer for few labels: the mean of two ridge regressions, on words and on surface features.

It has no hyperparameters to choose, because a few hundred labels are too few to choose a penalty
by: both penalties are fixed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import ClassVar, Self

import numpy as np

from pliant.routing.outcomes import Outcomes
from pliant.routing.scorers.features import TextFeatures, TextSettings
from pliant.routing.scorers.linear import (
    Floats,
    Linear,
    folds,
    logistic,
    out_of_fold,
    ridge,
    together,
)
from pliant.routing.scorers.protocol import Groups, Predictions, Prompts, Scorer, State, gains

_FOLDS = 5


class Pair(Scorer):
    """Two ridge regressions on who is right; the gain is the mean of their standardised gains.

    Ridge regression is linear in its targets, so the difference of two models' fits is the fit of
    the gain. The scale of the mean, and each model's probability, are fitted on out-of-fold
    predictions.
    """

    kind = "pair"
    settings: ClassVar[dict[str, TextSettings]] = {
        "words": TextSettings(words=20_000),
        "surface": TextSettings(words=0, waves=300),
    }
    # Chosen on MMLU alone, not on GSM8K: fitted on samples of 660 of its prompts, half of GSM8K's
    # number, and measured by APGR on others: the mean of 16 samples of all subjects, and the mean
    # over six domains (sciences, law, medicine, society, humanities, the rest) of 10 samples each.
    # All of words 8, 16, 32 x surface 1, 3, 10, 30 lie in .638-.640 and .625-.630, these at .640
    # and .629; words alone at most .633 and .622, surface alone .627 and .609. On the first four
    # samples of each, pair has .647 and .626, text .646 and .599, tfidf .625 and .611.
    strengths: ClassVar[dict[str, float]] = {"words": 16.0, "surface": 10.0}

    def __init__(self) -> None:
        self.features = {name: TextFeatures(which) for name, which in self.settings.items()}
        self.heads: dict[str, Linear] = {}
        self.spread: Floats = np.zeros((2, 0))
        """(2, m - 1) the standard deviation of each regression's gains."""
        self.line: Floats = np.zeros((2, 0))
        """(2, m - 1) intercept and slope of the gain, as a function of the mean."""
        self.right: Linear | None = None

    def fit(self, train: Outcomes, choice: Outcomes | None = None, seed: int = 0) -> Self:
        outcomes = together(train, choice)
        parts, predictions = folds(outcomes, _FOLDS, seed), []
        for name, which in self.settings.items():
            features = TextFeatures(which).fit(outcomes.prompts, seed)
            x, solve = features.matrix(outcomes.prompts), partial(ridge, alpha=self.strengths[name])
            self.features[name], self.heads[name] = features, solve(x, outcomes.right)
            predictions.append(out_of_fold(x, outcomes.right, parts, solve))
        self._fit_scale(predictions, outcomes.right)
        return self

    def predict(self, prompts: Prompts, groups: Groups = None) -> Predictions:
        assert self.right is not None, "not fitted"
        each = [self.heads[name](x.matrix(prompts)) for name, x in self.features.items()]
        gain = self.line[0] + self._mean_gain(each) * self.line[1]
        return Predictions(self.right(np.hstack(each)), np.hstack([np.zeros((len(gain), 1)), gain]))

    def state(self) -> State:
        assert self.right is not None, "not fitted"
        state = State(arrays={"spread": self.spread, "line": self.line})
        for name, features in self.features.items():
            inner = features.state()
            state.settings[name] = inner.settings
            state.arrays |= {f"{name}.{key}": array for key, array in inner.arrays.items()}
        for name, head in {**self.heads, "right": self.right}.items():
            state.arrays |= head.arrays(f"{name}.", np.float32)
        return state

    def load_state(self, state: State) -> None:
        arrays = state.arrays

        def inner(name: str) -> State:
            prefix = f"{name}."
            own = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
            return State(state.settings.get(name, {}), own)

        self.features = {name: TextFeatures.from_state(inner(name)) for name in self.settings}
        self.heads = {name: Linear.from_arrays(arrays, f"{name}.") for name in self.settings}
        self.right = Linear.from_arrays(arrays, "right.", logistic=True)
        self.spread, self.line = arrays["spread"], arrays["line"]

    def _fit_scale(self, predictions: Sequence[Floats], right: Floats) -> None:
        stacked = np.stack([gains(each)[:, 1:] for each in predictions])
        self.spread = np.maximum(stacked.std(axis=1), 1e-9)
        mean, true = self._mean_gain(predictions), right[:, 1:] - right[:, :1]
        centred = mean - mean.mean(axis=0)
        slope = (centred * true).sum(axis=0) / np.maximum((centred**2).sum(axis=0), 1e-9)
        # A slope below 0, from predictions without information, would reverse their order.
        slope = np.maximum(slope, 1e-6)
        self.line = np.stack([true.mean(axis=0) - slope * mean.mean(axis=0), slope])
        self.right = logistic(np.hstack(predictions), right, c=1.0)

    def _mean_gain(self, predictions: Sequence[Floats]) -> Floats:
        """(n, m - 1)"""
        stacked = np.stack([gains(each)[:, 1:] for each in predictions])
        mean: Floats = (stacked / self.spread[:, None]).mean(axis=0)
        return mean
