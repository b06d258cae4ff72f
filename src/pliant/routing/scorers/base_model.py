"""The language model that a scorer reads, loaded on first use, and prompts in its chat format."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pliant import loading
from pliant.data import has_chat_template
from pliant.errors import InvalidInput
from pliant.routing.backends.local import own_parameters, shared_model
from pliant.routing.prompts import Prompt, messages, text_of


class BaseLM:
    """A causal language model by its name; all users of one name share one copy."""

    def __init__(self, name: str, device: str | None = None) -> None:
        loading.resolve(name)  # so that an unknown name fails at once
        self.name = name
        self._device = device
        self._model: Any = None
        self._tokenizer: Any = None

    @property
    def model(self) -> Any:
        if self._model is None:
            # The same options as a backend's, so that both share one copy.
            options = {"device": self._device, "dtype": "auto", "trust_remote_code": False}
            self._model = shared_model(self.name, **options)
        return self._model

    @property
    def tokenizer(self) -> Any:
        if self._tokenizer is None:
            self._tokenizer = loading.load_tokenizer(self.name)
        return self._tokenizer

    def chat_format(self, prompts: Sequence[Prompt]) -> list[Any]:
        """The prompts as messages for a chat model, as plain text for any other."""
        if has_chat_template(self.tokenizer):
            return [messages(prompt) for prompt in prompts]
        return [text_of(prompt) for prompt in prompts]

    def reading_flops(self, prompts: Sequence[Prompt]) -> float:
        """The mean cost of reading a prompt, estimated like the cost of an answer in labels."""
        from pliant.complexity.prompts import ids_of

        ids = ids_of(self.chat_format(prompts), self.tokenizer)
        return 2.0 * own_parameters(self.model) * sum(map(len, ids)) / max(1, len(ids))


def base_lm(kind: str, base: BaseLM | str | None) -> BaseLM:
    """The model of a scorer that needs one; `base` may be its name."""
    if base is None:
        raise InvalidInput(f"{kind} reads a model: name one, as in make({kind!r}, base='nano-s')")
    return base if isinstance(base, BaseLM) else BaseLM(base)
