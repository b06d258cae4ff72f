"""The text and the token together: two witnesses, and a second storey that weighs them.

The second storey is fitted on rows that neither witness has seen: the choice split, which may be in
other words or of other groups than the training split. After that both learn from all rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from pliant.routing.outcomes import Outcomes
from pliant.routing.prompts import Prompt
from pliant.routing.scorers.cpx import Cpx
from pliant.routing.scorers.fitting import Floats, together
from pliant.routing.scorers.protocol import Predictions, Scorer, State, read_state
from pliant.routing.scorers.stack import Stack
from pliant.routing.scorers.text import Text

if TYPE_CHECKING:
    from pliant.complexity import Scores
    from pliant.routing.live.shared_prefill import Prefilling


class CpxAndText(Scorer):
    """A stack on `cpx` and `text`."""

    kind = "cpx+text"

    def __init__(self, **cpx: Any) -> None:
        self.cpx, self.text = Cpx(**cpx), Text()
        self.stack = Stack()

    def fit(self, train: Outcomes, choice: Outcomes | None = None, seed: int = 0) -> Self:
        seen, unseen = train.split((0.8, 0.2), seed) if choice is None else (train, choice)
        everything = together(train, choice)
        with self.cpx.remembering(everything):
            if choice is not None:
                self.cpx.choose(train, choice, seed)
                self.text.choose(train, choice, seed)
            self.cpx.learn(seen, seed)
            self.text.learn(seen, seed)
            self.stack = Stack().fit(self._said(unseen.asked), unseen.right)
            self.cpx.learn(everything, seed)
            self.text.learn(everything, seed)
        return self

    def predict(
        self, prompts: Sequence[Prompt], groups: Sequence[str] | None = None
    ) -> Predictions:
        return self.stack(self._said(prompts))

    def while_answering(self, prompt: Prompt) -> Prefilling:
        """The same, with the token read in the prefill of the base's own answer."""
        own = self.cpx.while_answering(prompt)

        def told(scores: Scores) -> Predictions:
            return self.stack(self._said([prompt], own.told(scores)))

        return replace(own, told=told)

    def flops(self, prompts: Sequence[Prompt]) -> float:
        return self.cpx.flops(prompts)

    def chosen(self) -> dict[str, Any]:
        return {**self.cpx.chosen(), **self.text.chosen()}

    def state(self) -> State:
        return self.stack.state()

    def take(self, state: State) -> None:
        self.stack = Stack.of(state)

    def save(self, folder: Path) -> None:
        for name, witness in (("cpx", self.cpx), ("text", self.text)):
            witness.save(folder / name)
        super().save(folder)

    @classmethod
    def load(cls, folder: Path, **cpx: Any) -> Self:
        found = cls(**cpx)
        found.take(read_state(folder, cls.kind))
        found.cpx = Cpx.load(folder / "cpx", **cpx)
        found.text = Text.load(folder / "text")
        return found

    def _said(self, prompts: Sequence[Prompt], read: Predictions | None = None) -> Floats:
        """(n, 2 m) what both say: of the text, as least squares has it."""
        right = (read or self.cpx.predict(prompts)).right
        assert right is not None
        return np.hstack([right, self.text.first(prompts)])
