"""The language model that a scorer reads: opened once for all who ask, and never changed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from pliant.routing.prompts import Prompt, messages, text_of


@lru_cache(maxsize=2)
def open_base(name: str) -> tuple[Any, Any]:
    """A frozen model in eval mode, and its tokenizer."""
    from pliant.loading import load

    model, tokenizer = load(name)
    model.requires_grad_(False)
    return model, tokenizer


def rendered(tokenizer: Any, prompts: Sequence[Prompt]) -> list[Any]:
    """As the base is asked: messages for its chat template, texts where it has none."""
    if getattr(tokenizer, "chat_template", None):
        return [messages(prompt) for prompt in prompts]
    return [text_of(prompt) for prompt in prompts]
