"""Try a model out on a few tokens, once, for properties that its structure does not show.

    verdict(model, "cache", ask, failed=lambda reason: False)

Such properties are whether a step on the cache equals one forward, whether padding on the left is
harmless, whether two passes are exact, and whether the model shifts its labels. A trial runs when
something first depends on it, and once for each state of the model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from contextlib import nullcontext
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from pliant.anatomy.anatomy import Anatomy
from pliant.anatomy.find import device_of
from pliant.anatomy.modes import eval_mode

Verdict = TypeVar("Verdict")

CLOSE, CLOSE_IN_HALF = 2e-5, 0.03
"""Relative to the norm. Rounding changes a hidden state by about 1e-6 in fp32 and up to 0.02 in
bf16; a wrong mask or position changes it by much more."""

_verdicts: WeakKeyDictionary[nn.Module, dict[Hashable, Any]] = WeakKeyDictionary()
_lock = threading.RLock()


def verdict(
    model: nn.Module,
    question: str,
    ask: Callable[[], Verdict],
    failed: Callable[[str], Verdict],
    *,
    in_eval_mode: bool = False,
) -> Verdict:
    """The result of `ask`, cached for the model in its current state.

    `ask` runs without gradient, and in eval mode if `in_eval_mode` is set. If it raises an error,
    `failed` turns the reason into the result. Running out of memory is raised and not cached.
    """
    with _lock:
        answers = _verdicts.setdefault(model, {})
        training = model.training and not in_eval_mode
        key = (question, training, _state(model))
        if key not in answers:
            with eval_mode(model) if in_eval_mode else nullcontext():
                answers[key] = _ask(model, ask, failed)
        return answers[key]


def _ask(model: nn.Module, ask: Callable[[], Verdict], failed: Callable[[str], Verdict]) -> Verdict:
    """Runs `ask` and restores the state of the random number generators."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    devices = [device.index or 0] if device.type == "cuda" else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            return ask()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # any error of a model that does not support the call
        message = " ".join(str(error).split())[:160]
        return failed(f"{type(error).__name__}: {message}".removesuffix(": "))


def _state(model: nn.Module) -> Hashable:
    """What a verdict may depend on: adapters with dropout may be added, the dtype may change."""
    modules = list(model.modules())
    dropout = sum(module.p for module in modules if isinstance(module, nn.Dropout))
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
    return len(modules), dropout, attention, is_full_precision(model)


def trial_ids(anatomy: Anatomy, length: int, device: torch.device | None = None) -> Tensor:
    """Two rows of ordinary tokens: special ones are at either end of the vocabulary."""
    size = int(getattr(anatomy.config, "vocab_size", 0) or 64)
    ids = torch.arange(2 * length).reshape(2, -1) * 3 % max(1, size // 2) + size // 4
    return ids.to(device or device_of(anatomy.embeddings))


def is_close(model: nn.Module, ours: Tensor, reference: Tensor) -> bool:
    """Equal up to rounding, as the dtype of the weights implies: Mamba's hidden states are in fp32
    for weights in bf16."""
    close = CLOSE if is_full_precision(model) else CLOSE_IN_HALF
    ours, reference = ours.double(), reference.double()
    return bool((ours - reference).norm() <= close * reference.norm())


def is_full_precision(model: nn.Module) -> bool:
    return all(p.dtype in (torch.float32, torch.float64) for p in model.parameters())
