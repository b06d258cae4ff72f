"""Which models are down: one that failed is left alone for a while, and then tried again, once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Breakers:
    """After a failure a model is down for `cooldown` seconds; the next call after that is a trial.

    While a trial runs the others stay away: if it succeeds the model is up again, if it fails it is
    down for as long once more. A trial that never ends counts as failed after another cool-down.
    """

    def __init__(self, cooldown: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._cooldown, self._clock = cooldown, clock
        self._until: dict[str, float] = {}
        self._lock = threading.Lock()

    def down(self, model: str) -> bool:
        """Whether to stay away from a model now; changes nothing."""
        with self._lock:
            return self._clock() < self._until.get(model, 0.0)

    def enter(self, model: str) -> bool:
        """Whether a call may begin now; of a model whose cool-down is over one call may."""
        with self._lock:
            if model not in self._until:
                return True
            if self._clock() < self._until[model]:
                return False
            self._until[model] = self._clock() + self._cooldown
            return True

    def failed(self, model: str) -> None:
        with self._lock:
            self._until[model] = self._clock() + self._cooldown

    def succeeded(self, model: str) -> None:
        with self._lock:
            self._until.pop(model, None)
