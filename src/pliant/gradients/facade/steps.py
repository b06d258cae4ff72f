"""What the facades count: steps, and draws, so that each is another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pliant.errors import InvalidInput
from pliant.gradients.config import GradientConfig
from pliant.gradients.schedule import Schedule


class Steps:
    """A schedule, and the generators of its draws."""

    def __init__(self, config: GradientConfig) -> None:
        self.schedule = Schedule(config)
        self.draws = 0

    def begin(self, items: Any = None) -> None:
        """A forward pass begins, of a step that has so many tokens, if a Trainer counted them."""
        self.schedule.begin(items)

    def step(self) -> None:
        self.schedule.step()

    def ratio(self, confidence: Tensor) -> float:
        """Of this step; only a dynamic one waits for the confidence."""
        dynamic = self.schedule.config.dynamic
        return self.schedule.ratio(float(confidence) if dynamic else None)

    def generator(self) -> torch.Generator:
        """Of the next draw."""
        self.draws += 1
        return torch.Generator().manual_seed(self.schedule.config.seed * 1_000_003 + self.draws)

    def state(self) -> dict[str, Any]:
        return {**self.schedule.state(), "draws": self.draws}

    def load_state(self, state: dict[str, Any]) -> None:
        draws = state.get("draws")
        if not isinstance(draws, int) or draws < 0:
            raise InvalidInput(f"draws = {draws!r} in a saved state: a whole number is due")
        self.schedule.load_state(state)
        self.draws = draws
