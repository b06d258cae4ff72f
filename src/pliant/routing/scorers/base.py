"""The model that a scorer reads, loaded when it is first needed, and prompts as it takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pliant import loading
from pliant.data import has_chat_template
from pliant.errors import InvalidInput
from pliant.routing.backends.local import own_parameters, shared_model
from pliant.routing.prompts import Prompt, messages, text_of


class Base:
    """A causal language model by its name; all who read the same share one copy."""

    def __init__(self, name: str, device: str | None = None) -> None:
        loading.resolve(name)  # a name that is none is said at once
        self.name = name
        self._device = device
        self._model: Any = None
        self._tokenizer: Any = None

    @property
    def model(self) -> Any:
        if self._model is None:
            # Spelt as a backend spells it, so that the two share the copy.
            options = {"device": self._device, "dtype": "auto", "trust_remote_code": False}
            self._model = shared_model(self.name, **options)
        return self._model

    @property
    def tokenizer(self) -> Any:
        if self._tokenizer is None:
            self._tokenizer = loading.load_tokenizer(self.name)
        return self._tokenizer

    def framed(self, prompts: Sequence[Prompt]) -> list[Any]:
        """Each as the model would be asked it: messages for a chat model, bare text for another."""
        if has_chat_template(self.tokenizer):
            return [messages(prompt) for prompt in prompts]
        return [text_of(prompt) for prompt in prompts]

    def reading_flops(self, prompts: Sequence[Prompt]) -> float:
        """What it takes to read a prompt, on average: estimated as labels estimate an answer."""
        from pliant.complexity.prompts import ids_of

        ids = ids_of(self.framed(prompts), self.tokenizer)
        return 2.0 * own_parameters(self.model) * sum(map(len, ids)) / max(1, len(ids))


def named(kind: str, base: Base | str | None) -> Base:
    """The base of a scorer that reads one."""
    if base is None:
        raise InvalidInput(f"{kind} reads a model: name one, as in make({kind!r}, base='nano-s')")
    return base if isinstance(base, Base) else Base(base)
