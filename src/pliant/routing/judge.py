"""A model behind a URL, or one that runs here, as the `ask` of a judge of answers."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from pliant.routing.backends import Answers, ModelSpec, Settings, open_backend


def open_judge(model: str, *, max_new_tokens: int = 256, **options: Any) -> Callable[[str], str]:
    """What takes a text and returns the model's reply to it, for `pliant.verify.Judge`.

    The model is written as for `pliant route label --judge`: openai:NAME@https://host/v1, nano-l, a
    folder. Options are those of `open_backend`: `key_env`, `timeout`, ... Nothing is loaded or
    called before the first text.
    """
    backend = open_backend(ModelSpec.parse(model), **options)
    settings = Settings(max_new_tokens)

    def ask(text: str) -> str:
        ((_, result),) = backend.ask([text], settings)
        if not isinstance(result, Answers):
            raise result
        return result.texts[0]

    weakref.finalize(ask, backend.close)  # a verifier has no end at which it could close it
    return ask
