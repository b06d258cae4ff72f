"""Which models can take a prompt now: those whose context it fits, and those that are not down."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence

from pliant.errors import InvalidInput, PliantError
from pliant.routing.backends import Backend
from pliant.routing.prompts import Prompt
from pliant.routing.router_file import ModelEntry


class ContextFit:
    """Compares prompts with the contexts of a router's models, each of which is looked up once."""

    def __init__(self, entries: Sequence[ModelEntry], backends: Mapping[str, Backend]) -> None:
        self._backends = backends
        self._contexts = {e.name: e.context for e in entries if e.context is not None}
        self._unlimited: set[str] = set()

    def fitting(self, prompt: Prompt, order: Sequence[str], answer_tokens: int) -> list[str]:
        """The models whose context fits the prompt and an answer, in this order.

        A long answer does not rule a model out: a quarter of its context is enough for one.
        """
        fitting, refusals = [], []
        for name in order:
            try:
                context = self._context(name)
                if context is None:
                    fitting.append(name)
                    continue
                size = self._backends[name].count(prompt) + min(answer_tokens, context // 4)
            except InvalidInput as error:  # its chat template refuses the messages, say
                refusals.append(str(error))
                continue
            except PliantError:  # it cannot be loaded: asking it will raise the same error
                fitting.append(name)
                continue
            if size <= context:
                fitting.append(name)
            else:
                refusals.append(f"about {size:,} tokens with an answer, and {name} has {context:,}")
        if not fitting:
            raise InvalidInput(f"no model takes this prompt: {'; '.join(refusals)}")
        return fitting

    def _context(self, name: str) -> int | None:
        if name not in self._contexts and name not in self._unlimited:
            context = self._backends[name].context()
            if context is None:
                self._unlimited.add(name)
            else:
                self._contexts[name] = context
        return self._contexts.get(name)


class Breakers:
    """After a failure a model is down for `cooldown` seconds; the next call after that is a trial.

    During a trial other calls avoid the model: if the trial succeeds the model is up again, if it
    fails the model is down for another cool-down. A trial that never ends counts as failed after
    one more cool-down.
    """

    def __init__(self, cooldown: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._cooldown, self._clock = cooldown, clock
        self._until: dict[str, float] = {}
        self._lock = threading.Lock()

    def down(self, model: str) -> bool:
        """Whether to avoid a model now; changes nothing."""
        with self._lock:
            return self._clock() < self._until.get(model, 0.0)

    def enter(self, model: str) -> bool:
        """Whether a call may begin now; one call may when a model's cool-down is over."""
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
