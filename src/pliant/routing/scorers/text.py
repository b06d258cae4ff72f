"""The best scorers on the text alone: `text`, and `pair` for few labels.

Text: ridge regression predicts out of fold how likely each model is right; a second stage predicts
the gain from that. If the cheap model fails, there is a gain only if the expensive model does not
fail as well, so the gain is not linear in the two probabilities: the second stage gets their
products. `python -m benchmarks.routing_labels` compares it with the plain scorers.

Pair: the mean of two ridge regressions, on words and on surface features. It has no hyperparameters
to choose, because a few hundred labels are too few to choose a penalty by: both are fixed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations_with_replacement
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from pliant.linear import Linear, logistic, ridge
from pliant.routing.outcomes import Outcomes
from pliant.routing.scorers.features import TextFeatures, TextSettings
from pliant.routing.scorers.linear import Floats, best, folds, gain_error, out_of_fold, together
from pliant.routing.scorers.protocol import Groups, Predictions, Prompts, Scorer, State, gains
from pliant.stats import as_difference

_FOLDS = 5
_FEW, _REPEATS, _SEED_STEP = 10_000, 3, 1000
"""With few labels, average over repeated folds: the second stage would fit the noise of one."""
_GROUP = 0.3**0.5
"""The weight of a group's column; the words have weight 1. Chosen on half of MMLU's labels."""


class Text(Scorer):
    """Words with each digit as 0, and surface features of the text."""

    kind = "text"
    settings: ClassVar[TextSettings] = TextSettings(words=20_000, waves=200)
    strengths: ClassVar[tuple[float, ...]] = (5.0, 15.0, 45.0, 135.0)

    features: TextFeatures
    groups: list[str]
    head: Linear
    stack: Stack

    def __init__(self) -> None:
        self.strength = self.strengths[1]

    def fit(self, train: Outcomes, choice: Outcomes | None = None, seed: int = 0) -> Self:
        if choice is not None:
            x = self._prepare(train, seed)
            x_choice = self._matrix(choice.prompts, choice.groups)

            def error(strength: float) -> float:
                self._fit_both(x, train, strength, seed, repeats=1)
                return gain_error(self.stack(self.head(x_choice)).gain, choice)

            self.strength, _ = best(self.strengths, error)
        everything = together(train, choice)
        repeats = _REPEATS if len(everything) <= _FEW else 1
        self._fit_both(self._prepare(everything, seed), everything, self.strength, seed, repeats)
        return self

    def predict(self, prompts: Prompts, groups: Groups = None) -> Predictions:
        predicted = self.stack(self.head(self._matrix(prompts, groups)))
        return replace(predicted, gain=as_difference(predicted.gain))

    def chosen(self) -> dict[str, Any]:
        return {"strength": self.strength}

    def state(self) -> State:
        state = self.features.state()
        state.settings |= {"groups": self.groups, "strength": self.strength}
        state.arrays |= self.stack.arrays()
        state.arrays |= self.head.arrays(weight=np.float32)
        return state

    def load_state(self, state: State) -> None:
        self.features = TextFeatures.from_state(state)
        self.groups = list(state.settings["groups"])
        self.strength = state.settings["strength"]
        self.stack = Stack.from_arrays(state.arrays)
        self.head = Linear.from_arrays(state.arrays)

    def _prepare(self, outcomes: Outcomes, seed: int) -> Any:
        self.groups = sorted(set(outcomes.groups or ())) if self.needs_groups else []
        self.features = TextFeatures(self.settings).fit(outcomes.prompts, seed)
        return self._matrix(outcomes.prompts, outcomes.groups)

    def _fit_both(
        self, x: Any, outcomes: Outcomes, strength: float, seed: int, repeats: int
    ) -> None:
        solve = partial(ridge, alpha=strength)
        partitions = [folds(outcomes, _FOLDS, seed + _SEED_STEP * i) for i in range(repeats)]
        predictions = [out_of_fold(x, outcomes.right, parts, solve) for parts in partitions]
        self.stack = Stack.fit(np.mean(predictions, axis=0), outcomes.right)
        self.head = solve(x, outcomes.right)

    def _matrix(self, prompts: Prompts, groups: Groups) -> Any:
        from scipy.sparse import hstack

        x = self.features.matrix(prompts)
        if not self.groups:
            return x
        return hstack([x, self._group_columns(len(prompts), groups)], format="csr")

    def _group_columns(self, n: int, groups: Groups) -> Any:
        """(n, groups) one-hot; the row of an unknown group is empty."""
        from scipy.sparse import csr_matrix

        at = {name: i for i, name in enumerate(self.groups)}
        cells = [(i, at[name]) for i, name in enumerate(groups or ()) if name in at]
        rows, columns = [i for i, _ in cells], [j for _, j in cells]
        return csr_matrix(([_GROUP] * len(cells), (rows, columns)), shape=(n, len(at)))


class TextAndGroup(Text):
    """Text that also uses each prompt's group, which must be known when routing, too."""

    kind = "text+group"
    needs_groups = True


@dataclass(frozen=True, eq=False)
class Stack:
    """The second stage: ridge for the gains, logistic regression for the probabilities."""

    mean: Floats
    std: Floats
    gain: Linear
    right: Linear

    @classmethod
    def fit(cls, predictions: Floats, right: Floats) -> Stack:
        """`predictions` (n, k) out of fold; `right` (n, m)."""
        x = products(predictions)
        mean, std = x.mean(axis=0), x.std(axis=0) + 1e-6
        z = (x - mean) / std
        gain = ridge(z, right[:, 1:] - right[:, :1], alpha=1.0)
        return cls(mean, std, gain, logistic(z, right, c=1.0))

    def __call__(self, predictions: Floats) -> Predictions:
        z = (products(predictions) - self.mean) / self.std
        gain = self.gain(z)
        return Predictions(self.right(z), np.hstack([np.zeros((len(gain), 1)), gain]))

    def arrays(self) -> dict[str, NDArray[Any]]:
        heads = self.gain.arrays("stack.gain.") | self.right.arrays("stack.right.")
        return {"stack.mean": self.mean, "stack.std": self.std, **heads}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Stack:
        gain = Linear.from_arrays(arrays, "stack.gain.")
        right = Linear.from_arrays(arrays, "stack.right.", logistic=True)
        return cls(arrays["stack.mean"], arrays["stack.std"], gain, right)


def products(x: Floats) -> Floats:
    """The columns, their squares and all products of two columns."""
    pairs = combinations_with_replacement(range(x.shape[1]), 2)
    return np.hstack([x, *(x[:, [i]] * x[:, [j]] for i, j in pairs)])


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

    features: dict[str, TextFeatures]
    heads: dict[str, Linear]
    spread: Floats
    """(2, m - 1) the standard deviation of each regression's gains."""
    line: Floats
    """(2, m - 1) intercept and slope of the gain, as a function of the mean."""
    right: Linear

    def fit(self, train: Outcomes, choice: Outcomes | None = None, seed: int = 0) -> Self:
        outcomes = together(train, choice)
        parts, predictions = folds(outcomes, _FOLDS, seed), []
        self.features, self.heads = {}, {}
        for name, which in self.settings.items():
            features = TextFeatures(which).fit(outcomes.prompts, seed)
            x, solve = features.matrix(outcomes.prompts), partial(ridge, alpha=self.strengths[name])
            self.features[name], self.heads[name] = features, solve(x, outcomes.right)
            predictions.append(out_of_fold(x, outcomes.right, parts, solve))
        self._fit_scale(predictions, outcomes.right)
        return self

    def predict(self, prompts: Prompts, groups: Groups = None) -> Predictions:
        each = [self.heads[name](x.matrix(prompts)) for name, x in self.features.items()]
        gain = self.line[0] + self._mean_gain(each) * self.line[1]
        gain = as_difference(np.hstack([np.zeros((len(gain), 1)), gain]))
        return Predictions(self.right(np.hstack(each)), gain)

    def state(self) -> State:
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
