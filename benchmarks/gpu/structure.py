"""What gates cost, and what removal saves: prefill, decoding, and a training step.

Beside the original there is the same with gates at 1 on heads, channels and layers, and smaller
stock models: without half of the KV groups, a quarter of the channels, or a fifth of the layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.gpu.contest import contest
from benchmarks.gpu.models import build, random_ids
from benchmarks.gpu.rows import Keep
from benchmarks.gpu.steps import step
from pliant.structure import GateConfig, attach
from pliant.structure.pruning.costs import Part, cost, sketch

WHOLE = "the original"
REMOVED: dict[str, dict[Part, float]] = {
    "half of the KV groups removed": {"heads": 0.5},
    "a quarter of the channels removed": {"channels": 0.25},
    "a fifth of the layers removed": {"layers": 0.2},
}


def measure(settings: dict[str, Any], device: str, keep: Keep) -> None:
    models = contenders(settings, device)
    ids = random_ids(models[WHOLE], 1, settings["prompt"])
    for what, run in {"prefill": prefill, "decoding": decoding(settings["new"])}.items():
        runs = {name: run(model, ids) for name, model in models.items()}
        contest(runs, WHOLE, settings["rounds"], device, _named(keep, what))
    for name, model in models.items():
        keep(f"{name}, cache", {"bytes": cost(model, "kv")})
    if settings["training"]:
        runs = {name: training(model, ids) for name, model in models.items()}
        contest(runs, WHOLE, settings["rounds"], device, _named(keep, "training step"))


def contenders(settings: dict[str, Any], device: str) -> dict[str, PreTrainedModel]:
    """The smaller ones share what is not sliced with the original."""
    whole, gated = build(settings, device), build(settings, device)
    attach(gated, GateConfig(("heads", "channels", "layers"))).requires_grad_(False)
    smaller = {name: sketch(whole, shares) for name, shares in REMOVED.items()}
    return {WHOLE: whole, "gates at 1": gated, **smaller}


def prefill(model: PreTrainedModel, ids: Tensor) -> Callable[[], None]:
    @torch.no_grad()
    def run() -> None:
        model(input_ids=ids, use_cache=True, logits_to_keep=1)

    return run


def decoding(new: int) -> Callable[[PreTrainedModel, Tensor], Callable[[], None]]:
    """Steps on the prompt's cache, which is cropped again."""

    def of(model: PreTrainedModel, ids: Tensor) -> Callable[[], None]:
        with torch.no_grad():
            cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values

        @torch.no_grad()
        def run() -> None:
            for _ in range(new):
                model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)
            cache.crop(-new)

        return run

    return of


def training(model: PreTrainedModel, ids: Tensor) -> Callable[[], None]:
    return lambda: step(model, ids, ids)


def _named(keep: Keep, what: str) -> Keep:
    """The contenders' names come first, as the control's ratio names it."""
    return lambda name, figures: keep(f"{name}, {what}", figures)
