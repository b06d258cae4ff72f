"""Which prompts a step trains on: those that have something to teach.

A group of answers that are all right, or all wrong, has no gradient. With success probability p, a
prompt's answers differ most at p = 1/2: prompts are drawn in proportion to p (1 - p), with p
estimated from the rewards so far. A prompt that was never tried counts as p = 1/2, and some are
drawn evenly, since the expert changes and old estimates with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pliant.errors import InvalidInput

PRIOR = 2.0
"""Answers that the prior is worth: half of them right."""
MEMORY = 0.7
"""How much of its earlier answers a prompt retains when it is tried again."""


class PromptSampler:
    """Draws prompts by their estimated p (1 - p); the same draws for the same seed and rewards."""

    def __init__(self, count: int, seed: int = 0, exploration: float = 0.1) -> None:
        if count < 1:
            raise InvalidInput("there are no prompts to train on")
        self.seed, self.exploration = seed, exploration
        self.tried = np.zeros(count)
        """Answers to each prompt, the earlier ones fading."""
        self.rewarded = np.zeros(count)
        """The sum of their rewards."""
        self.lowest, self.highest = np.inf, -np.inf
        """Of all rewards so far: success is measured between them."""
        self.draws = 0

    @property
    def success(self) -> np.ndarray[Any, Any]:
        """The estimated p of each prompt."""
        spread = self.highest - self.lowest
        if not spread > 0:
            return np.full(len(self.tried), 0.5)
        right = (self.rewarded - self.lowest * self.tried) / spread
        return (right + PRIOR / 2) / (self.tried + PRIOR)

    @property
    def weights(self) -> np.ndarray[Any, Any]:
        """The probability of each prompt to be drawn first."""
        p = self.success
        teaching = p * (1 - p)
        return (1 - self.exploration) * teaching / teaching.sum() + self.exploration / len(p)

    def draw(self, count: int) -> list[int]:
        """Different prompts, as long as there are enough."""
        rng = np.random.default_rng([self.seed, self.draws])
        self.draws += 1
        weights, drawn = self.weights, list[int]()
        while len(drawn) < count:
            size = min(count - len(drawn), len(weights))
            drawn += rng.choice(len(weights), size, replace=False, p=weights).tolist()
        return drawn

    def update(self, drawn: Sequence[int], rewards: Sequence[Sequence[float]]) -> None:
        """Learn from the rewards of each drawn prompt's answers; NaN counts as no answer."""
        for prompt, group in zip(drawn, np.asarray(rewards, dtype=np.float64), strict=True):
            valid = group[np.isfinite(group)]
            if not len(valid):
                continue
            self.lowest = min(self.lowest, float(valid.min()))
            self.highest = max(self.highest, float(valid.max()))
            self.tried[prompt] = MEMORY * self.tried[prompt] + len(valid)
            self.rewarded[prompt] = MEMORY * self.rewarded[prompt] + float(valid.sum())

    def state(self) -> dict[str, Any]:
        """Everything that the next draws depend on, for JSON."""
        bounds = [self.lowest, self.highest] if self.highest >= self.lowest else None
        return {
            "draws": self.draws,
            "bounds": bounds,
            "tried": self.tried.tolist(),
            "rewarded": self.rewarded.tolist(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        if len(state["tried"]) != len(self.tried):
            raise InvalidInput(
                f"the checkpoint has {len(state['tried'])} prompts, and the task has "
                f"{len(self.tried)}: resume with the same task"
            )
        self.draws = int(state["draws"])
        self.lowest, self.highest = state["bounds"] or (np.inf, -np.inf)
        self.tried = np.asarray(state["tried"], dtype=np.float64)
        self.rewarded = np.asarray(state["rewarded"], dtype=np.float64)
