"""How many tokens are trained at which step: the curriculum, and the steps that train them all."""

from __future__ import annotations

from typing import Any

from pliant.errors import InvalidInput
from pliant.gradients.config import GradientConfig


class Schedule:
    """Counts steps, and says the ratio of each.

    It counts forward passes by itself as long as nobody calls `step`. Whoever does (a training
    loop, or a Trainer's callback) counts alone from then on: what was seen before the first call
    belonged to that first step.
    """

    def __init__(self, config: GradientConfig) -> None:
        self.config = config
        self.steps = 0
        """Steps that are over."""
        self._start = 0
        self._by_hand = False

    def ratio(self, confidence: float | None = None) -> float:
        """The share of tokens to train now: 1 on dense steps and at the start of the warm-up.

        With `dynamic`, a mean top probability below 1/2 raises the ratio and one above it lowers
        it, by up to `sensitivity` of it, within half of it and 1; during the warm-up by as much
        less as there is still to go. A "fixed_quota" is not moved.
        """
        if self.is_dense():
            return 1.0
        progress = self._progress()
        base = 1.0 - progress * (1.0 - self.config.ratio)
        if confidence is None or not self.config.dynamic or self.config.selection == "fixed_quota":
            return base
        pull = progress * self.config.sensitivity * (1.0 - 2.0 * confidence)
        return min(1.0, max(base / 2, base * (1.0 + pull)))

    def is_dense(self) -> bool:
        """Whether this step trains every token, whatever the ratio is."""
        every = self.config.dense_every
        return self.steps < self.config.dense_first or (every > 0 and self.steps % every == 0)

    def forward_seen(self) -> None:
        """A forward pass was trained: a step, unless somebody calls `step`."""
        if not self._by_hand:
            self.steps += 1

    def step(self) -> None:
        """The optimizer has stepped."""
        if not self._by_hand:
            self.steps, self._by_hand = self._start, True
        self.steps += 1

    def state(self) -> dict[str, Any]:
        """What `take` goes on from, for JSON."""
        return {"steps": self.steps, "by_hand": self._by_hand}

    def take(self, state: dict[str, Any]) -> None:
        """Go on where a saved schedule was."""
        steps, by_hand = state.get("steps"), state.get("by_hand")
        if not isinstance(steps, int) or steps < 0 or not isinstance(by_hand, bool):
            raise InvalidInput(
                f'a schedule\'s state is {{"steps": 3, "by_hand": true}}: not {state!r}'
            )
        self.steps = self._start = steps
        self._by_hand = by_hand

    def _progress(self) -> float:
        """How much of the warm-up is over."""
        if self.config.warmup_steps == 0:
            return 1.0
        return min(1.0, max(0, self.steps - self.config.dense_first) / self.config.warmup_steps)
