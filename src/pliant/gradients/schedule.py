"""How many tokens are trained at which step: the curriculum, and the steps that train them all."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pliant.errors import InvalidInput
from pliant.gradients.config import GradientConfig


class Schedule:
    """Counts steps and gives the ratio of each.

    Once `step` is called (by a training loop or a Trainer's callback), only it counts: what came
    before the first call belonged to that first step. Until then `begin` distinguishes steps from
    the parts of an accumulated one, as far as a forward pass can know.
    """

    def __init__(self, config: GradientConfig) -> None:
        self.config = config
        self.steps = 0
        """Steps that are over."""
        self._start = 0
        self._by_hand = False
        self._open = False
        self._items: Any = None
        self._version: int | None = None
        self._watching = False
        """Whether the weights were seen to change: then that is what ends a step."""

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

    def begin(self, items: Any = None, version: int | None = None) -> None:
        """A forward pass begins that trains: of another step than the last one's, or of the same.

        A step is over when the weights have changed (`version`, see `version_of`). Where that is
        never seen (sharded weights, DeepSpeed's, and those of fused optimizers change behind
        torch's back), a Trainer gives all parts of a step the same count of tokens, the very same
        tensor (`items`). Where there is neither, a forward pass is a step.
        """
        changed = version is not None and version != self._version
        if self._open:
            if changed and not self._watching:  # what was seen until now was one step
                self.steps, self._watching = self._start if not self._by_hand else self.steps, True
                self.forward_seen()
            elif changed if self._watching else not _is_same(items, self._items):
                self.forward_seen()
        self._open, self._items, self._version = True, items, version

    def forward_seen(self) -> None:
        """A forward pass was trained that is a step, unless somebody calls `step`."""
        if not self._by_hand:
            self.steps += 1

    def step(self) -> None:
        """The optimizer has stepped."""
        if not self._by_hand:
            self.steps, self._by_hand = self._start, True
        self.steps += 1

    def state(self) -> dict[str, Any]:
        """For `load_state`, as JSON: the forward pass that was last begun is over."""
        ahead = self._open and not self._by_hand
        return {"steps": self.steps + ahead, "by_hand": self._by_hand}

    def load_state(self, state: dict[str, Any]) -> None:
        """Resume from a saved state."""
        steps, by_hand = state.get("steps"), state.get("by_hand")
        if not isinstance(steps, int) or steps < 0 or not isinstance(by_hand, bool):
            raise InvalidInput(
                f'a schedule\'s state is {{"steps": 3, "by_hand": true}}: not {state!r}'
            )
        self.steps = self._start = steps
        self._by_hand = by_hand
        self._open, self._items, self._version, self._watching = False, None, None, False

    def _progress(self) -> float:
        """How much of the warm-up is over."""
        if self.config.warmup_steps == 0:
            return 1.0
        return min(1.0, max(0, self.steps - self.config.dense_first) / self.config.warmup_steps)


def version_of(model: nn.Module) -> int:
    """Another number once an optimizer has written into the weights that are trained."""
    return sum(p._version for p in model.parameters() if p.requires_grad)


def _is_same(items: Any, before: Any) -> bool:
    """Whether both are one tensor: another step's count may well be the same number."""
    if not isinstance(items, Tensor) or not isinstance(before, Tensor):
        return False
    return items is before or items.data_ptr() == before.data_ptr()
