"""Tries out on a model whether it supports its cache, and padding on the left."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pliant.anatomy import Anatomy
from pliant.anatomy.trial import is_close, trial_ids, verdict
from pliant.prefill.batch import Batch
from pliant.prefill.forward import inputs_of, on_cache, on_top, run

LENGTH, SHORTER, NEW = 61, 33, 2
"""Tokens. Sparse attention has to choose among so many, in the shorter prompt as well; a model with
a shorter context gets shorter prompts."""


def supports_cache(anatomy: Anatomy) -> bool:
    """Whether a step on the model's cache equals one forward over all positions."""
    return _try(anatomy, "cache", _step_equals_forward)


def supports_padding(anatomy: Anatomy) -> bool:
    """Whether a prompt with padding on the left has the same output as without."""
    return _try(anatomy, "padding on the left", _padding_is_harmless)


def groups(anatomy: Anatomy, batch: Batch) -> list[list[int] | None]:
    """The rows that may run together: all of them (None), or the rows of each length if the model
    does not support padding. An empty prompt would be padding alone, so it never runs with others.
    """
    if not batch.is_ragged:
        return [None]
    if not supports_padding(anatomy):
        return list(batch.by_length())
    empty = [row for row, length in enumerate(batch.lengths) if not length]
    if not empty:
        return [None]
    return [[row for row, length in enumerate(batch.lengths) if length], empty]


def _try(anatomy: Anatomy, question: str, ask: Callable[[Anatomy], bool]) -> bool:
    """A model that raises an error supports neither."""
    return verdict(
        anatomy.model, question, lambda: ask(anatomy), lambda reason: False, in_eval_mode=True
    )


def _step_equals_forward(anatomy: Anatomy) -> bool:
    batch, new = _trial(anatomy)
    expected = on_top(anatomy, batch, new)
    result = run(anatomy, {**inputs_of(anatomy, batch), "use_cache": True})
    if result.cache is None:
        return False
    return is_close(anatomy.model, on_cache(anatomy, batch, result, new), expected)


def _padding_is_harmless(anatomy: Anatomy) -> bool:
    """Tried without the cache and, if it is supported, with it: GIT's mask is right without it
    only."""
    batch, new = _trial(anatomy)
    mask, length = batch.mask_BT.clone(), batch.mask_BT.shape[1]
    mask[1, : length - length * SHORTER // LENGTH] = 0
    padded = Batch(batch.ids_BT, mask)
    alone = on_top(anatomy, padded.select([1]), new[1:])
    if not is_close(anatomy.model, on_top(anatomy, padded, new)[1:], alone):
        return False
    if not supports_cache(anatomy):
        return True
    result = run(anatomy, {**inputs_of(anatomy, padded), "use_cache": True})
    return is_close(anatomy.model, on_cache(anatomy, padded, result, new)[1:], alone)


def _trial(anatomy: Anatomy) -> tuple[Batch, Tensor]:
    """Two prompts, and the positions that follow them."""
    longest = int(getattr(anatomy.config, "max_position_embeddings", 0) or LENGTH + NEW)
    length = max(1, min(LENGTH, longest - NEW))
    ids = trial_ids(anatomy, length + NEW)
    return Batch(ids[:, :length], torch.ones_like(ids[:, :length])), ids[:, length:]
