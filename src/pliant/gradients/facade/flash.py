"""The fastest attention that a model, its dtype and this machine allow, and which it is."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import is_flash_attn_2_available

from pliant import loading
from pliant.errors import InvalidInput, UnsupportedModel

Backend = Literal["auto", "flash_attention_2", "sdpa", "eager"]
BEST_FIRST = ("flash_attention_2", "sdpa", "eager")
HALVES = (torch.float16, torch.bfloat16)
AMPERE = (8, 0)
"""The compute capability that flash-attention 2 needs."""


class AttentionWarning(UserWarning):
    """The requested attention is unavailable; another implementation is used."""


def load_model_with_flash_attention(
    model_name_or_path: str | Path,
    backend: Backend = "auto",
    torch_dtype: torch.dtype | str | None = None,
    device_map: str | dict[str, Any] | None = "auto",
    **options: Any,
) -> PreTrainedModel:
    """A model by name, with the best attention available; `options` are those of `pliant.load`.

    The dtype is the checkpoint's unless it is given (bfloat16 for flash-attention 2, which takes no
    other than half ones).
    """
    order = _order(backend)
    why_not = _why_no_flash(None)
    if torch_dtype is None:
        torch_dtype = torch.bfloat16 if "flash_attention_2" in order and not why_not else "auto"
    model = loading.load_model(
        model_name_or_path, dtype=torch_dtype, device_map=device_map, **options
    )
    return enable_flash_attention(model, backend)


def enable_flash_attention(
    model: PreTrainedModel, backend: Backend = "auto", verbose: bool = True
) -> PreTrainedModel:
    """Switch `model` to an attention implementation, by default the best one, and print which.

    An implementation that is not available falls back to the next, with a warning.
    """
    if not hasattr(model, "set_attn_implementation"):
        raise UnsupportedModel(
            f"{type(model).__name__} has no choice of attention: a transformers model has one"
        )
    reasons: dict[str, str] = {}
    for candidate in _order(backend):
        reason = _refusal(model, candidate)
        if reason is None:
            break
        reasons[candidate] = reason
    now = str(model.config._attn_implementation)
    if backend in reasons:
        warnings.warn(
            f"{type(model).__name__} has {now} attention, not {backend}: {reasons[backend]}",
            AttentionWarning,
            stacklevel=2,
        )
    if verbose:
        missed = "".join(f"; no {kind}: {why}" for kind, why in reasons.items())
        print(f"{type(model).__name__}: {now} attention{missed}")
    return model


def _order(backend: str) -> tuple[str, ...]:
    """The implementations to try, best first, beginning with the requested one."""
    if backend == "auto":
        return BEST_FIRST
    if backend not in BEST_FIRST:
        raise InvalidInput(f"backend = {backend!r}: give auto or one of {', '.join(BEST_FIRST)}")
    return BEST_FIRST[BEST_FIRST.index(backend) :]


def _refusal(model: Any, kind: str) -> str | None:
    """Switch the model to this implementation; returns the reason where that fails."""
    if kind == "flash_attention_2":
        reason = _why_no_flash(model)
        if reason:
            return reason
    try:
        model.set_attn_implementation(kind)
    except (ValueError, ImportError) as error:
        return str(error).split(". ")[0]
    if model.config._attn_implementation != kind:
        return "the model does not let its attention be exchanged"
    return None


def _why_no_flash(model: nn.Module | None) -> str:
    if not is_flash_attn_2_available():
        return "flash-attn is not installed, or there is no GPU for it"
    if torch.cuda.get_device_capability() < AMPERE:
        return f"{torch.cuda.get_device_name()} is older than Ampere"
    if model is not None:
        parameter = next(model.parameters())
        if parameter.device.type != "cuda":
            return f"the model is on {parameter.device}"
        if parameter.dtype not in HALVES:
            return f"the model is in {parameter.dtype}, and it takes half precision"
    return ""
