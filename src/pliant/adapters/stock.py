"""A stock model made of tensors, and the proof that its checkpoint computes the same.

Every part that writes a stock checkpoint does so here: a model is assembled from a state and shares
its tensors, its folder is reloaded with plain transformers, and its logits are compared with those
of the live model before the folder gets its name.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights

from pliant.adapters.fingerprint import is_packed
from pliant.errors import InvalidInput, UnsupportedModel

BOUNDS = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.01}
"""The largest difference of a logit from the live model's, relative to the largest logit."""
PROBE = 24  # tokens in each of the two rows that the models are compared on
SHARD_SIZE = "5GB"
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def check_exportable(base: nn.Module) -> None:
    """Refuse a model whose weights are not at hand as numbers."""
    if is_packed(base):
        raise UnsupportedModel("the model is quantised: load it in 16 or 32 bits to export it")
    if any(p.is_meta for p in base.parameters()):
        raise UnsupportedModel("part of the model is offloaded: load all of it to export it")


# --- a model of tensors --------------------------------------------------------------------------


def skeleton(kind: type[nn.Module], config: Any) -> Any:
    """The model without weights, in eval mode."""
    from accelerate import init_empty_weights

    # Rotary frequencies are in no state, so buffers are real.
    with init_empty_weights(include_buffers=False), no_init_weights():
        model: Any = kind(copy.deepcopy(config))
    return model.eval()


def assembled(kind: type[nn.Module], config: Any, state: Mapping[str, Tensor]) -> Any:
    """The model, in eval mode; its tensors are those of `state`, and none is allocated."""
    model = skeleton(kind, config)
    model.load_state_dict(dict(state), strict=False, assign=True)
    model.tie_weights()
    if missing := [name for name, p in model.named_parameters() if p.is_meta]:
        raise UnsupportedModel(f"{kind.__name__}: nothing gives it its {missing[0]}")
    return model


def save(model: Any, base: Any, tokenizer: Any, folder: Path, shard_size: str = SHARD_SIZE) -> None:
    """Write the stock model with what belongs to the base: generation settings and tokenizer."""
    model.generation_config = base.generation_config
    model.save_pretrained(folder, max_shard_size=shard_size)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def bytes_of(size: str) -> int:
    """The bytes of a size such as 500MB or 5GB."""
    text = size.strip().upper()
    for unit, factor in _UNITS.items():
        number = text.removesuffix(unit)
        plain = number.strip().replace(".", "", 1).isdigit()
        if number != text and plain and (value := int(float(number) * factor)):
            return value
    raise InvalidInput(f"shard size {size!r}: give a size such as 500MB or 5GB")


# --- the proof -----------------------------------------------------------------------------------


def bound_of(logits: Tensor) -> float:
    """The largest difference that is allowed in this precision."""
    return BOUNDS.get(logits.dtype, 0.05)


@torch.no_grad()
def logits_of(model: Any, probe: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=probe, use_cache=False).logits
    return logits


def difference_of(ours: Tensor, theirs: Tensor) -> float:
    largest = max(1.0, float(theirs.abs().max()))
    difference = float((ours.to(theirs) - theirs).abs().max()) / largest
    return difference if difference == difference else float("inf")


def proof(folder: Path, base: Any, probe: Tensor, live: Tensor) -> float:
    """Reload with plain transformers; raise unless it agrees with the live model."""
    again = AutoModelForCausalLM.from_pretrained(
        folder, dtype=base.dtype, attn_implementation=base.config._attn_implementation
    ).eval()
    difference = difference_of(logits_of(again.to(probe.device), probe), live)
    if difference > bound_of(live):
        raise disagreement(again, difference, live)
    return difference


def disagreement(
    again: nn.Module, difference: float, live: Tensor, bound: float | None = None
) -> UnsupportedModel:
    """The error of a reloaded model that computes something else than the live one."""
    allowed = bound_of(live) if bound is None else bound
    return UnsupportedModel(
        f"the reloaded {type(again).__name__} does not agree with the live model: its logits "
        f"differ by {difference:.2g}, and {allowed:g} is allowed in {live.dtype}. Nothing "
        "was written"
    )
