"""For few labels: two plain witnesses of the gain, the words and the surface, of equal weight.

Nothing is chosen on the labels at hand, for a few hundred of them do not tell one strength of a
penalty from another: both strengths are fixed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import ClassVar, Self

import numpy as np

from pliant.routing.outcomes import Outcomes
from pliant.routing.prompts import Prompt
from pliant.routing.scorers.features import TextFeatures, TextSettings
from pliant.routing.scorers.fitting import (
    Floats,
    Linear,
    folds,
    logistic,
    out_of_fold,
    ridge,
    together,
)
from pliant.routing.scorers.protocol import Predictions, Scorer, State, over_the_first

_FOLDS = 5


class Pair(Scorer):
    """Two ridges on who is right; their gains, each in units of its own spread, are averaged.

    Least squares is linear in its targets, so the difference of two models' fits is the fit of the
    gain. How much a unit of the average is worth, and what it says of each model's chance, is
    learned from what both say out of fold.
    """

    kind = "pair"
    settings: ClassVar[dict[str, TextSettings]] = {
        "words": TextSettings(words=20_000),
        "surface": TextSettings(words=0, waves=300),
    }
    # Chosen on MMLU alone, never on GSM8K: fitted on draws of 660 of its prompts, as many as GSM8K
    # has in a half, and measured by APGR on others: the mean of 16 draws of all subjects, and the
    # mean over six domains (sciences, law, medicine, society, humanities, the rest) of 10 draws
    # each. All of words 8, 16, 32 x surface 1, 3, 10, 30 lie in .638-.640 and .625-.630, these at
    # .640 and .629; words alone at most .633 and .622, surface alone .627 and .609. On the first
    # four draws of each pair has .647 and .626, text .646 and .599, tfidf .625 and .611.
    strengths: ClassVar[dict[str, float]] = {"words": 16.0, "surface": 10.0}

    def __init__(self) -> None:
        self.features = {name: TextFeatures(which) for name, which in self.settings.items()}
        self.heads: dict[str, Linear] = {}
        self.spread: Floats = np.zeros((2, 0))
        """(2, m - 1) the standard deviation of each witness's gains."""
        self.line: Floats = np.zeros((2, 0))
        """(2, m - 1) the gain at an average of 0, and what a unit more of it is worth."""
        self.right: Linear | None = None

    def fit(self, train: Outcomes, choice: Outcomes | None = None, seed: int = 0) -> Self:
        outcomes = together(train, choice)
        parts, said = folds(outcomes, _FOLDS, seed), []
        for name, which in self.settings.items():
            features = TextFeatures(which).fit(outcomes.prompts, seed)
            x, solve = features.matrix(outcomes.prompts), partial(ridge, alpha=self.strengths[name])
            self.features[name], self.heads[name] = features, solve(x, outcomes.right)
            said.append(out_of_fold(x, outcomes.right, parts, solve))
        self._weigh(said, outcomes.right)
        return self

    def predict(
        self, prompts: Sequence[Prompt], groups: Sequence[str] | None = None
    ) -> Predictions:
        assert self.right is not None, "not fitted"
        said = [self.heads[name](x.matrix(prompts)) for name, x in self.features.items()]
        gain = self.line[0] + self._average(said) * self.line[1]
        return Predictions(self.right(np.hstack(said)), np.hstack([np.zeros((len(gain), 1)), gain]))

    def state(self) -> State:
        assert self.right is not None, "not fitted"
        state = State(arrays={"spread": self.spread, "line": self.line})
        for name, features in self.features.items():
            inner = features.state()
            state.settings[name] = inner.settings
            state.arrays |= {f"{name}.{key}": array for key, array in inner.arrays.items()}
        for name, head in {**self.heads, "right": self.right}.items():
            state.arrays[f"{name}.weight"] = head.weight.astype(np.float32)
            state.arrays[f"{name}.bias"] = head.bias
        return state

    def take(self, state: State) -> None:
        arrays = state.arrays

        def inner(name: str) -> State:
            begin = f"{name}."
            own = {k.removeprefix(begin): v for k, v in arrays.items() if k.startswith(begin)}
            return State(state.settings.get(name, {}), own)

        def head(name: str, logistic: bool = False) -> Linear:
            own = inner(name).arrays
            return Linear(own["weight"].astype(np.float64), own["bias"], logistic)

        self.features = {name: TextFeatures.of(inner(name)) for name in self.settings}
        self.heads = {name: head(name) for name in self.settings}
        self.right = head("right", logistic=True)
        self.spread, self.line = arrays["spread"], arrays["line"]

    def _weigh(self, said: Sequence[Floats], right: Floats) -> None:
        gains = np.stack([over_the_first(one)[:, 1:] for one in said])
        self.spread = np.maximum(gains.std(axis=1), 1e-9)
        average, true = self._average(said), right[:, 1:] - right[:, :1]
        away = average - average.mean(axis=0)
        slope = (away * true).sum(axis=0) / np.maximum((away**2).sum(axis=0), 1e-9)
        # Where both say nothing it may come out below 0: the order stays that of the fits.
        slope = np.maximum(slope, 1e-6)
        self.line = np.stack([true.mean(axis=0) - slope * average.mean(axis=0), slope])
        self.right = logistic(np.hstack(said), right, c=1.0)

    def _average(self, said: Sequence[Floats]) -> Floats:
        """(n, m - 1)"""
        gains = np.stack([over_the_first(one)[:, 1:] for one in said])
        average: Floats = (gains / self.spread[:, None]).mean(axis=0)
        return average
