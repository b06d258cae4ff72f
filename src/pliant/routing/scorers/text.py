"""The best that is known of the text alone: words, surface and, where they are told, groups.

Least squares says out of fold how likely each model is right; a second storey makes the gain of it
(`stack`). Measured beside the plain forms by `python -m benchmarks.routing_labels`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import numpy as np

from pliant.routing.outcomes import Outcomes
from pliant.routing.prompts import Prompt
from pliant.routing.scorers.features import TextFeatures, TextSettings
from pliant.routing.scorers.fitting import (
    Floats,
    Linear,
    best,
    folds,
    gain_error,
    out_of_fold,
    ridge,
    together,
)
from pliant.routing.scorers.protocol import Predictions, Scorer, State
from pliant.routing.scorers.stack import Stack

_FOLDS = 5
_FEW, _DEALS, _APART = 10_000, 3, 1000
"""Of few labels the folds are dealt several times: one deal's chance shows in the second storey."""
_GROUP = 0.3**0.5
"""The length of a group's column, beside the 1 of the words: chosen on half of MMLU's labels."""


class Text(Scorer):
    """Words with the shapes of numbers, and the surface of the text."""

    kind = "text"
    settings: ClassVar[TextSettings] = TextSettings(words=20_000, waves=200)
    strengths: ClassVar[tuple[float, ...]] = (5.0, 15.0, 45.0, 135.0)

    def __init__(self) -> None:
        self.features = TextFeatures(self.settings)
        self.groups: list[str] = []
        self.strength = self.strengths[1]
        self.head: Linear | None = None
        self.stack = Stack()

    def fit(self, train: Outcomes, choice: Outcomes | None = None, seed: int = 0) -> Self:
        if choice is not None:
            self.choose(train, choice, seed)
        return self.learn(together(train, choice), seed)

    def choose(self, train: Outcomes, choice: Outcomes, seed: int = 0) -> None:
        """Find the penalty that, learned with on `train`, is best on `choice`."""
        x = self._prepare(train, seed)
        held = self._matrix(choice.prompts, choice.groups)

        def error(strength: float) -> float:
            self._fit_both(x, train, strength, seed, deals=1)
            assert self.head is not None
            return gain_error(self.stack(self.head(held)).gain, choice)

        self.strength, _ = best(self.strengths, error)

    def learn(self, outcomes: Outcomes, seed: int = 0) -> Self:
        """Fit with the penalty that was chosen."""
        deals = _DEALS if len(outcomes) <= _FEW else 1
        self._fit_both(self._prepare(outcomes, seed), outcomes, self.strength, seed, deals)
        return self

    def predict(
        self, prompts: Sequence[Prompt], groups: Sequence[str] | None = None
    ) -> Predictions:
        return self.stack(self.first(prompts, groups))

    def first(self, prompts: Sequence[Prompt], groups: Sequence[str] | None = None) -> Floats:
        """(n, m) what the least squares says, before the second storey."""
        assert self.head is not None, "not fitted"
        return self.head(self._matrix(prompts, groups))

    def chosen(self) -> dict[str, Any]:
        return {"strength": self.strength}

    def state(self) -> State:
        assert self.head is not None, "not fitted"
        state = self.features.state()
        state.settings |= {"groups": self.groups, "strength": self.strength}
        state.arrays |= self.stack.state().arrays
        state.arrays["weight"] = self.head.weight.astype(np.float32)
        state.arrays["bias"] = self.head.bias
        return state

    def take(self, state: State) -> None:
        self.features = TextFeatures.of(state)
        self.groups = list(state.settings["groups"])
        self.strength = state.settings["strength"]
        self.stack = Stack.of(state)
        self.head = Linear(state.arrays["weight"].astype(np.float64), state.arrays["bias"])

    def _prepare(self, outcomes: Outcomes, seed: int) -> Any:
        self.groups = self._known(outcomes)
        self.features = TextFeatures(self.settings).fit(outcomes.prompts, seed)
        return self._matrix(outcomes.prompts, outcomes.groups)

    def _fit_both(self, x: Any, outcomes: Outcomes, strength: float, seed: int, deals: int) -> None:
        said = [
            out_of_fold(
                x,
                outcomes.right,
                folds(outcomes, _FOLDS, seed + _APART * deal),
                lambda a, b: ridge(a, b, strength),
            )
            for deal in range(deals)
        ]
        self.stack = Stack().fit(np.mean(said, axis=0), outcomes.right)
        self.head = ridge(x, outcomes.right, strength)

    def _matrix(self, prompts: Sequence[Prompt], groups: Sequence[str] | None) -> Any:
        from scipy.sparse import hstack

        x = self.features.matrix(prompts)
        return hstack([x, self._columns(len(prompts), groups)], format="csr") if self.groups else x

    def _columns(self, n: int, groups: Sequence[str] | None) -> Any:
        """(n, groups): where a prompt's group is known; else the row is empty."""
        from scipy.sparse import csr_matrix

        at = {name: i for i, name in enumerate(self.groups)}
        found = [(i, at[name]) for i, name in enumerate(groups or ()) if name in at]
        rows, columns = [i for i, _ in found], [j for _, j in found]
        return csr_matrix(([_GROUP] * len(found), (rows, columns)), shape=(n, len(at)))

    def _known(self, outcomes: Outcomes) -> list[str]:
        return []


class TextAndGroup(Text):
    """The same, which also knows each prompt's group: who routes has to know it too."""

    kind = "text+group"
    needs_groups = True

    def _known(self, outcomes: Outcomes) -> list[str]:
        return sorted(set(outcomes.groups or ()))
