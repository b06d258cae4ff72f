"""What is tried on a model before it is trusted with a cache, or with padding on the left."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pliant.anatomy import Anatomy
from pliant.anatomy.trial import is_close, trial_ids, verdict
from pliant.prefill.batch import Batch
from pliant.prefill.run import inputs_of, on_cache, on_top, run

LENGTH, SHORTER, NEW = 61, 33, 2
"""Long enough that sparse attention has to choose, in the shorter prompt as well; less where a
model takes less."""


def keeps_cache(anatomy: Anatomy) -> bool:
    """Whether a step on this model's cache gives what one forward over everything gives."""
    return _try(anatomy, "cache", _step_equals_forward)


def bears_padding(anatomy: Anatomy) -> bool:
    """Whether a prompt that is padded on the left gives what it gives alone."""
    return _try(anatomy, "padding on the left", _padding_is_harmless)


def groups(anatomy: Anatomy, batch: Batch) -> list[list[int] | None]:
    """The rows that may run together: all (None); or each length for itself, where the model does
    not bear padding. A prompt of no token would be padding alone: it never runs beside others.
    """
    if not batch.is_ragged:
        return [None]
    if not bears_padding(anatomy):
        return list(batch.by_length())
    empty = [row for row, length in enumerate(batch.lengths) if not length]
    if not empty:
        return [None]
    return [[row for row, length in enumerate(batch.lengths) if length], empty]


def _try(anatomy: Anatomy, question: str, ask: Callable[[Anatomy], bool]) -> bool:
    """A model that cannot even run so answers no."""
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
    """On the cache as well, where there is one: GIT's mask, for one, is right only without."""
    batch, new = _trial(anatomy)
    mask, length = batch.mask_BT.clone(), batch.mask_BT.shape[1]
    mask[1, : length - length * SHORTER // LENGTH] = 0
    padded = Batch(batch.ids_BT, mask)
    alone = on_top(anatomy, padded.take([1]), new[1:])
    if not is_close(anatomy.model, on_top(anatomy, padded, new)[1:], alone):
        return False
    if not keeps_cache(anatomy):
        return True
    result = run(anatomy, {**inputs_of(anatomy, padded), "use_cache": True})
    return is_close(anatomy.model, on_cache(anatomy, padded, result, new)[1:], alone)


def _trial(anatomy: Anatomy) -> tuple[Batch, Tensor]:
    """Two prompts, and what comes after them."""
    longest = int(getattr(anatomy.config, "max_position_embeddings", 0) or LENGTH + NEW)
    length = max(1, min(LENGTH, longest - NEW))
    ids = trial_ids(anatomy, length + NEW)
    return Batch(ids[:, :length], torch.ones_like(ids[:, :length])), ids[:, length:]
