"""How an exported model proves itself: its logits are the live model's, up to rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from pliant.anatomy import Anatomy
from pliant.errors import UnsupportedModel
from pliant.structure.config import GateConfig, Kind
from pliant.structure.exporting.remaining import remaining_layers
from pliant.structure.gates import Gates, attach
from pliant.structure.stock.smaller import Stock

BOUNDS = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.01}
"""The largest difference of a logit from the live model's, relative to the largest logit."""
PROBE = 24  # tokens in each of the two rows that the models are compared on


def closest(
    candidates: Iterable[Stock], agree: Callable[[Any], float], kind: Kind, bound: float
) -> tuple[Stock, Any]:
    """The first candidate that computes the same, and the model that it builds.

    `agree` says by how much the logits of a model differ from what they should be.
    """
    best = float("inf")
    for stock in candidates:
        model = stock.build()
        best = min(best, difference := agree(model))
        if difference <= bound:
            return stock, model
    raise UnsupportedModel(
        f"a model with fewer {kind} computes something else (by {best:.2g}): their number enters "
        "elsewhere"
    )


@contextmanager
def layers_closed(model: Any, gates: list[Gates]) -> Iterator[None]:
    """Closes the layers of another model that these gates close."""
    depth = len(Anatomy.of(model).layers)
    closed = sorted(set(range(depth)) - set(remaining_layers(gates, depth)))
    if not closed:
        yield
        return
    own = attach(model, GateConfig(("layers",)))
    try:
        for i in closed:
            own["layers", i].zero_()
        yield
    finally:
        own.detach()


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


def disagreement(again: nn.Module, difference: float, live: Tensor) -> UnsupportedModel:
    """The error of a reloaded model that computes something else than the live one."""
    return UnsupportedModel(
        f"the reloaded {type(again).__name__} does not agree with the live model: its logits "
        f"differ by {difference:.2g}, and {bound_of(live):g} is allowed in {live.dtype}. Nothing "
        "was written"
    )
