"""What has to be tried on a model before it is trusted with a cache, or with padding on the left.

Both are tried once a model, on a few tokens, and only when something depends on the answer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from pliant.anatomy import Anatomy
from pliant.anatomy.rest import at_rest
from pliant.prefill.batch import Batch, device_of
from pliant.prefill.run import inputs_of, on_cache, on_top, run

LENGTH, SHORTER, NEW = 61, 33, 2
"""So long that sparse attention has to choose, in the shorter prompt as well; less where a model
takes less."""
CLOSE, CLOSE_IN_HALF = 2e-5, 0.03
"""Relative. Rounding alone makes about 1e-6 of a hidden state in fp32, and up to 0.02 in bf16."""

_known: WeakKeyDictionary[nn.Module, dict[str, bool]] = WeakKeyDictionary()
_lock = threading.RLock()


def keeps_cache(anatomy: Anatomy) -> bool:
    """Whether a step on this model's cache gives what one forward over everything gives."""
    return _asked(anatomy, "cache", _steps_as_a_whole)


def bears_padding(anatomy: Anatomy) -> bool:
    """Whether a prompt that is padded on the left gives what it gives alone."""
    return _asked(anatomy, "padding", _pads_unnoticed)


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


def _asked(anatomy: Anatomy, what: str, ask: Callable[[Anatomy], bool]) -> bool:
    with _lock:
        known = _known.setdefault(anatomy.model, {})
        if what not in known:
            with at_rest(anatomy.model):
                known[what] = _tried(ask, anatomy)
        return known[what]


@torch.no_grad()
def _tried(ask: Callable[[Anatomy], bool], anatomy: Anatomy) -> bool:
    """A model that cannot even run so answers no; that memory ran out is no answer."""
    try:
        return ask(anatomy)
    except torch.OutOfMemoryError:
        raise
    except Exception:
        return False


def _steps_as_a_whole(anatomy: Anatomy) -> bool:
    batch, new = _trial(anatomy)
    whole = on_top(anatomy, batch, new)
    ran = run(anatomy, {**inputs_of(anatomy, batch), "use_cache": True})
    return ran.cache is not None and _same(anatomy, on_cache(anatomy, batch, ran, new), whole)


def _pads_unnoticed(anatomy: Anatomy) -> bool:
    """On the cache as well, where there is one: GIT's mask, for one, is right only without."""
    batch, new = _trial(anatomy)
    mask, length = batch.mask_BT.clone(), batch.mask_BT.shape[1]
    mask[1, : length - length * SHORTER // LENGTH] = 0
    padded = Batch(batch.ids_BT, mask)
    alone = on_top(anatomy, padded.take([1]), new[1:])
    if not _same(anatomy, on_top(anatomy, padded, new)[1:], alone):
        return False
    if not keeps_cache(anatomy):
        return True
    ran = run(anatomy, {**inputs_of(anatomy, padded), "use_cache": True})
    return _same(anatomy, on_cache(anatomy, padded, ran, new)[1:], alone)


def _trial(anatomy: Anatomy) -> tuple[Batch, Tensor]:
    """Two prompts of ordinary tokens (special ones lie at both ends), and what comes after."""
    size = int(getattr(anatomy.config, "vocab_size", 0) or 64)
    room = int(getattr(anatomy.config, "max_position_embeddings", 0) or LENGTH + NEW)
    length = max(1, min(LENGTH, room - NEW))
    ids = torch.arange(2 * (length + NEW)).reshape(2, -1) * 3 % max(1, size // 2) + size // 4
    ids = ids.to(device_of(anatomy.embeddings))
    return Batch(ids[:, :length], torch.ones_like(ids[:, :length])), ids[:, length:]


def _same(anatomy: Anatomy, one: Tensor, other: Tensor) -> bool:
    """To what rounding makes; a hidden state in fp32 may come of weights in bf16 (Mamba's does)."""
    exact = all(p.dtype in (torch.float32, torch.float64) for p in anatomy.model.parameters())
    close = CLOSE if exact else CLOSE_IN_HALF
    return bool((one - other).float().norm() <= close * other.float().norm())
