"""The least that is a scorer: long prompts are hard, and what is not ASCII it has never seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np

from pliant.routing.outcomes import Outcomes
from pliant.routing.prompts import Prompt, text_of
from pliant.routing.scorers import Predictions, Scorer
from pliant.routing.scorers.protocol import State


class Letters(Scorer):
    """P(the first model is right) falls from 1 to 0 over the first hundred letters."""

    kind = "letters"

    def __init__(self, models: int = 2, letters: int = 100) -> None:
        self.models, self.letters, self.asked = models, letters, 0

    def fit(self, train: Outcomes, choice: Outcomes | None = None, seed: int = 0) -> Self:
        return self

    def predict(
        self, prompts: Sequence[Prompt], groups: Sequence[str] | None = None
    ) -> Predictions:
        self.asked += len(prompts)
        texts = [text_of(prompt) for prompt in prompts]
        hard = np.array([min(1.0, len(text) / self.letters) for text in texts])
        steps = np.arange(self.models) / (self.models - 1)
        right = 1 - hard[:, None] * (1 - steps)[None, :]
        novel = np.array([not text.isascii() for text in texts])
        return Predictions(right, right - right[:, :1], novel)

    def state(self) -> State:
        return State({"models": self.models, "letters": self.letters})

    def load_state(self, state: State) -> None:
        self.__init__(**state.settings)  # type: ignore[misc]


def content(**changes: Any) -> dict[str, Any]:
    """What a router's file says, of two models that run here."""
    return {
        "unit": "calls",
        "models": [
            {"name": "nano-s", "backend": "nano-s", "cost": 1.0},
            {"name": "nano-l", "backend": "nano-l", "cost": 5.0},
        ],
        "scorer": {"kind": "letters"},
        "threshold": {"value": 0.2, "sentence": "a fifth"},
        "default": "nano-l",
        **changes,
    }
