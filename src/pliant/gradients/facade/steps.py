"""What the facades count: steps, without being told of them, and draws, so that each is another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pliant.errors import InvalidInput
from pliant.gradients.config import GradientConfig
from pliant.gradients.schedule import Schedule


class Steps:
    """A schedule that advances at the first forward pass of each step, until somebody steps it."""

    def __init__(self, config: GradientConfig) -> None:
        self.schedule = Schedule(config)
        self.draws = 0
        self._open = False
        self._items: Any = None

    def begin(self, items: Any = None) -> None:
        """A forward pass begins. A Trainer gives all batches of one optimizer step the same count
        of tokens, the very same object: these are one step."""
        if self._open and (items is None or items is not self._items):
            self.schedule.forward_seen()
        self._open, self._items = True, items

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
        """Between two steps: the forward pass that was last begun is over."""
        ahead = Schedule(self.schedule.config)
        ahead.take(self.schedule.state())
        if self._open:
            ahead.forward_seen()
        return {**ahead.state(), "draws": self.draws}

    def take(self, state: dict[str, Any]) -> None:
        draws = state.get("draws")
        if not isinstance(draws, int) or draws < 0:
            raise InvalidInput(f"draws = {draws!r} in a saved state: a whole number is due")
        self.schedule.take(state)
        self.draws, self._open, self._items = draws, False, None
