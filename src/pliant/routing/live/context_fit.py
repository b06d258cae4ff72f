"""Which models have room for a prompt and an answer to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pliant.errors import InvalidInput, PliantError
from pliant.routing.backends.protocol import Backend
from pliant.routing.prompts import Prompt
from pliant.routing.router_file import ModelEntry


class Rooms:
    """The contexts of a router's models, each looked up once."""

    def __init__(self, entries: Sequence[ModelEntry], backends: Mapping[str, Backend]) -> None:
        self._stated = {entry.name: entry.context for entry in entries}
        self._backends = backends
        self._contexts: dict[str, int | None] = {}

    def fitting(self, prompt: Prompt, order: Sequence[str], answer: int) -> list[str]:
        """Those that take the prompt, in this order.

        A long `answer` is not held against a prompt: a quarter of the context is room enough.
        """
        found, refused = [], []
        for name in order:
            try:
                context = self._context(name)
                if context is None:
                    found.append(name)
                    continue
                size = self._backends[name].count(prompt) + min(answer, context // 4)
            except InvalidInput as error:  # its chat template takes no such messages, say
                refused.append(str(error))
                continue
            except PliantError:  # it cannot be loaded: whoever asks it will find that out
                found.append(name)
                continue
            if size <= context:
                found.append(name)
            else:
                refused.append(f"about {size:,} tokens with an answer, and {name} has {context:,}")
        if not found:
            raise InvalidInput(f"no model takes this prompt: {'; '.join(refused)}")
        return found

    def _context(self, name: str) -> int | None:
        if name not in self._contexts:
            stated = self._stated[name]
            self._contexts[name] = self._backends[name].context() if stated is None else stated
        return self._contexts[name]
