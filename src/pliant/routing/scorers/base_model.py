"""The language model that a scorer reads, loaded on first use, and prompts in its chat format."""

from __future__ import annotations

from typing import Any

from pliant import loading
from pliant.data import has_chat_template
from pliant.errors import InvalidInput
from pliant.routing.backends.local import own_parameters, shared_model
from pliant.routing.prompts import messages, text_of
from pliant.routing.scorers.protocol import Prompts, Scorer


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

    def chat_format(self, prompts: Prompts) -> list[Any]:
        """The prompts as messages for a chat model, as plain text for any other."""
        if has_chat_template(self.tokenizer):
            return [messages(prompt) for prompt in prompts]
        return [text_of(prompt) for prompt in prompts]

    def reading_flops(self, prompts: Prompts) -> float:
        """The mean cost of reading a prompt, estimated like the cost of an answer in labels."""
        from pliant.complexity.prompts import ids_of

        ids = ids_of(self.chat_format(prompts), self.tokenizer)
        return 2.0 * own_parameters(self.model) * sum(map(len, ids)) / max(1, len(ids))


class ModelScorer(Scorer):
    """A scorer that reads a base model, given by its name."""

    def __init__(self, base: BaseLM | str | None) -> None:
        self._base = base

    @property
    def base(self) -> BaseLM:
        """The model that it reads."""
        kind, base = self.kind, self._base
        if base is None:
            raise InvalidInput(
                f"{kind} reads a model: name one, as in make({kind!r}, base='nano-s')"
            )
        self._base = base if isinstance(base, BaseLM) else BaseLM(base)
        return self._base

    def flops(self, prompts: Prompts) -> float:
        return self.base.reading_flops(prompts)
