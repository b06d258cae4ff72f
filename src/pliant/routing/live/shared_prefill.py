"""Answers that continue from the prefill that scored their prompt.

A scorer that reads the cheap model has run the prompt through it, which is the first part of that
model's answer. Such a scorer offers `while_answering(prompt)`, and the router continues from that
prefill if it then chooses the same model. Otherwise it discards the prefill.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from pliant.errors import InvalidInput
from pliant.routing.backends import Answers, Backend, Settings
from pliant.routing.backends.local import LocalBackend, out_of_memory
from pliant.routing.scorers import Predictions, Prefilling

if TYPE_CHECKING:
    from pliant.complexity import Scores
    from pliant.routing.prompts import Prompt

Decide = Callable[[Predictions], Settings | None]
"""Called once after scoring: the settings for the answer, or None if another model answers."""


def backend_of(
    prefilling: Prefilling, backends: Mapping[str, Backend]
) -> tuple[str, LocalBackend] | None:
    """The router's model that the scorer reads, if the two share one copy."""
    for name, backend in backends.items():
        if isinstance(backend, LocalBackend) and backend.loaded is prefilling.reader.base:
            return name, backend
    return None


def answer(
    prefilling: Prefilling, backend: LocalBackend, prompt: Prompt, longest: int, decide: Decide
) -> Answers | None:
    """The answer, if `decide` chooses this model with greedy decoding; else None."""
    ids = backend.ids(prompt)
    limit = backend.context()
    most = longest if limit is None else min(longest, limit - len(ids))
    if most < 1:
        raise InvalidInput(f"{backend.name}: the prompt fills the context, so no answer fits")
    stop = _at_most(len(ids))

    def leaves(scores: Scores) -> list[bool]:
        settings = decide(prefilling.predictions(scores))
        if settings is None or settings.temperature > 0 or settings.max_new_tokens > longest:
            return [True]
        stop.limit = settings.max_new_tokens
        return [False]

    begun = time.perf_counter()
    try:
        with backend.exclusive:
            output = prefilling.reader.generate(
                [ids],
                leave_above=leaves,
                max_new_tokens=most,
                stopping_criteria=[stop],
                **backend.greedy_options(),
            )
    except RuntimeError as error:
        if out_of_memory(error):
            return None  # the backend retries with less memory
        raise
    if output.left[0]:
        return None
    tokens: list[int] = output.sequences[0].tolist()[len(ids) :]  # type: ignore[union-attr]
    return backend.answers(ids, [tokens], (time.perf_counter() - begun) * 1000)


def _at_most(prompt: int) -> Any:
    """A limit on the answer's length that is set after the run has begun."""
    import torch
    from transformers import StoppingCriteria

    class AtMost(StoppingCriteria):
        limit = 0

        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            done = input_ids.shape[1] - prompt >= self.limit
            return torch.full((len(input_ids),), done, device=input_ids.device)

    return AtMost()
