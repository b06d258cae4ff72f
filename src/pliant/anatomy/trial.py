"""Trying a model out: what cannot be read from its structure is tried once, on a few tokens.

    verdict(model, "cache", ask, failed=lambda reason: False)

Whether a step on the cache equals one forward, whether padding on the left is harmless, whether two
passes are exact, whether labels are shifted: an architecture's name would not tell. Each question
is asked once for each state of the model, when something first depends on the answer.
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
"""Relative to the norm. Rounding alone makes about 1e-6 of a hidden state in fp32, and up to 0.02
in bf16; a wrong mask or position makes much more."""

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
    """The answer of `ask`, remembered for the model in its present state.

    It is asked without gradient, and in eval mode where the question is about that.
    `failed` turns the reason into an answer where the model cannot even run so. That memory ran out
    is no answer: it is raised, and the question stays open.
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
    """The random numbers are afterwards as they were before."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    devices = [device.index or 0] if device.type == "cuda" else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            return ask()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model says to a call that it was not made for
        message = " ".join(str(error).split())[:160]
        return failed(f"{type(error).__name__}: {message}".removesuffix(": "))


def _state(model: nn.Module) -> Hashable:
    """What an answer may depend on: adapters with dropout may be added, the dtype may change."""
    modules = list(model.modules())
    dropout = sum(module.p for module in modules if isinstance(module, nn.Dropout))
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
    return len(modules), dropout, attention, is_full_precision(model)


def trial_ids(anatomy: Anatomy, length: int) -> Tensor:
    """Two rows of ordinary tokens: special ones lie at both ends of a vocabulary."""
    size = int(getattr(anatomy.config, "vocab_size", 0) or 64)
    ids = torch.arange(2 * length).reshape(2, -1) * 3 % max(1, size // 2) + size // 4
    return ids.to(device_of(anatomy.embeddings))


def is_close(model: nn.Module, ours: Tensor, reference: Tensor) -> bool:
    """Equal up to rounding. A hidden state in fp32 may come of weights in bf16 (Mamba's does)."""
    close = CLOSE if is_full_precision(model) else CLOSE_IN_HALF
    ours, reference = ours.double(), reference.double()
    return bool((ours - reference).norm() <= close * reference.norm())


def is_full_precision(model: nn.Module) -> bool:
    return all(p.dtype in (torch.float32, torch.float64) for p in model.parameters())
