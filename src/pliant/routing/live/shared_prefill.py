"""An answer that goes on from the prefill in which its prompt was scored.

A scorer that reads the cheap model while that model runs the prompt has done the first part of its
answer, too. Such a scorer offers `while_answering(prompt)`; what it offers is used if the router
then decides for that very model. Else the prefill is let go, and has cost what scoring costs.
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
"""Called once, in the middle of the prefill: how this model shall answer, or None: it shall not."""


def backend_of(
    prefilling: Prefilling, backends: Mapping[str, Backend]
) -> tuple[str, LocalBackend] | None:
    """The model of a router that the scorer reads, where the two share one copy."""
    for name, backend in backends.items():
        if isinstance(backend, LocalBackend) and backend.loaded is prefilling.reader.base:
            return name, backend
    return None


def answer(
    prefilling: Prefilling,
    backend: LocalBackend,
    prompt: Prompt,
    longest: int,
    decide: Decide,
) -> Answers | None:
    """The answer, if `decide` lets this model give one as the scorer's run can: greedily."""
    ids = backend.ids(prompt)
    limit = backend.context()
    room = longest if limit is None else min(longest, limit - len(ids))
    if room < 1:
        raise InvalidInput(f"{backend.name}: the prompt leaves no room for an answer")
    stop = _at_most(len(ids))

    def leaves(scores: Scores) -> list[bool]:
        settings = decide(prefilling.predictions(scores))
        if settings is None or settings.temperature > 0 or settings.max_new_tokens > longest:
            return [True]
        stop.limit = settings.max_new_tokens
        return [False]

    begun = time.perf_counter()
    try:
        with backend.exclusive():
            found = prefilling.reader.generate(
                [ids],
                leave_above=leaves,
                max_new_tokens=room,
                stopping_criteria=[stop],
                **backend.greedy_options(),
            )
    except RuntimeError as error:
        if out_of_memory(error):
            return None  # the backend knows what to do about that
        raise
    if found.left[0]:
        return None
    said: list[int] = found.sequences[0].tolist()[len(ids) :]  # type: ignore[union-attr]
    return backend.answers(ids, [said], (time.perf_counter() - begun) * 1000)


def _at_most(prompt: int) -> Any:
    """How long the answer may be is decided after the run has begun."""
    import torch
    from transformers import StoppingCriteria

    class AtMost(StoppingCriteria):
        limit = 0

        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            done = input_ids.shape[1] - prompt >= self.limit
            return torch.full((len(input_ids),), done, device=input_ids.device)

    return AtMost()
