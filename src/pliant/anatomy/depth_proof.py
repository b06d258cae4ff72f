"""Checks on a model that `run_first` and `resume` give the model's own bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pliant.anatomy.anatomy import Anatomy
from pliant.anatomy.cache_copy import copy_state
from pliant.anatomy.decoder import last_hidden_state, run_both
from pliant.anatomy.depth import cache_name, run_first


@dataclass(frozen=True)
class DepthProof:
    """None for each property that holds, and the reason for each that does not."""

    first_layers: str | None
    """`run_first` with all layers gives the decoder's own last hidden state."""
    resume: str | None
    """Stopped half-way and resumed, the model gives its own output and a cache to continue from."""


@torch.no_grad()
def prove_depth(model: nn.Module | Anatomy, input_ids: Tensor, **inputs: Any) -> DepthProof:
    """Compare a full run of `model` with one that is stopped and resumed, bit by bit."""
    inputs = {"input_ids": input_ids, **inputs}
    inputs.setdefault("use_cache", _can_cache(model, inputs))
    return DepthProof(
        first_layers=_reason(_compare_last_hidden_states, model, inputs),
        resume=_reason(_compare_outputs, model, inputs),
    )


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal in shape, dtype and every element, NaN being equal to itself."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def _compare_last_hidden_states(anatomy: Anatomy, inputs: dict[str, Any]) -> str | None:
    decoded, _ = run_both(anatomy, copy_state(inputs))
    first = run_first(anatomy, len(anatomy.layers), resumable=False, **inputs)
    if same_bits(first.normed, last_hidden_state(decoded)):
        return None
    return "all layers do not give the model's own last hidden state"


def _compare_outputs(anatomy: Anatomy, inputs: dict[str, Any]) -> str | None:
    full = anatomy.model(**copy_state(inputs))
    resumed = run_first(anatomy, max(1, len(anatomy.layers) // 2), **inputs).resume()
    if not same_bits(resumed.logits, full.logits):
        return "the resumed logits are not the model's own"
    name = cache_name(full)
    if name is None:
        return None
    try:
        expected = _next_logits(anatomy.model, full, name)
    except Exception:  # the model cannot continue from its own cache: nothing to compare with
        return None
    if same_bits(_next_logits(anatomy.model, resumed, name), expected):
        return None
    return "the resumed cache does not carry on as the model's own"


def _can_cache(model: nn.Module | Anatomy, inputs: dict[str, Any]) -> bool:
    """Whether the model runs with `use_cache`; BLT does not."""
    whole = model.model if isinstance(model, Anatomy) else model
    try:
        whole(**copy_state(inputs), use_cache=True)
    except Exception:
        return False
    return True


def _next_logits(model: nn.Module, output: Any, name: str) -> Tensor:
    token = output.logits[:, -1:].argmax(dim=-1)
    return model(input_ids=token, use_cache=True, **{name: getattr(output, name)}).logits


def _reason(
    compare: Callable[[Anatomy, dict[str, Any]], str | None],
    model: nn.Module | Anatomy,
    inputs: dict[str, Any],
) -> str | None:
    try:
        anatomy = model if isinstance(model, Anatomy) else Anatomy.of(model)
        return compare(anatomy, inputs)
    except Exception as error:  # any failure is a reason
        return f"{type(error).__name__}: {error}"
