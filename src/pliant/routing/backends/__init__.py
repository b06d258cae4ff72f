"""Backends ask models that run here and models behind a URL in the same way.

backend = open_backend(ModelSpec.parse("nano-s"))
for i, answers in backend.ask(["what is 2+2"], Settings(max_new_tokens=24)):
    ...                     # in the order in which they finish; a BackendError if one failed
"""

from __future__ import annotations

from typing import Any

from pliant.routing.backends.protocol import (
    Answers,
    Backend,
    BackendError,
    BackendWarning,
    ModelSpec,
    Price,
    PromptFormat,
    Result,
    Settings,
    Used,
    check_names,
)
from pliant.routing.backends.remote import Retry

__all__ = [
    "Answers",
    "Backend",
    "BackendError",
    "BackendWarning",
    "ModelSpec",
    "Price",
    "PromptFormat",
    "Result",
    "Retry",
    "Settings",
    "Used",
    "check_names",
    "open_backend",
]


def open_backend(spec: ModelSpec, **options: Any) -> Backend:
    """The backend of a model; it loads or calls nothing before the first `ask`.

    Options: prompt_format; for a model that runs here also device, dtype, tokens_a_batch,
    batch_size, trust_remote_code; for one behind a URL: key_env, concurrency, timeout, retry,
    context_tokens.
    """
    if spec.url is None:
        from pliant.routing.backends.local import LocalBackend

        return LocalBackend(spec.name, spec.model, **options)
    from pliant.routing.backends.remote import OpenAIBackend

    return OpenAIBackend(spec.name, spec.model, spec.url, **options)
