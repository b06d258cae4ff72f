"""Channels as Torch-Pruning (pip install torch-pruning) removes them: a control that others wrote.

Its dependency graph finds that gate, up and down projections lose the same channels, and its
importances rank these as groups: by magnitude, or by a Taylor expansion of the loss.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pliant.anatomy import Anatomy

IMPORTANCES = ("magnitude", "taylor")


def is_installed() -> bool:
    return importlib.util.find_spec("torch_pruning") is not None


def without_channels(
    model: Any, share: float, importance: str, batches: Sequence[dict[str, Tensor]]
) -> Any:
    """A copy of a Llama without a share of every layer's channels."""
    import torch_pruning as tp

    smaller = copy.deepcopy(model).requires_grad_(True)
    if importance == "taylor":
        ranks = tp.importance.GroupTaylorImportance()
        for batch in batches:
            smaller(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
    else:
        ranks = tp.importance.GroupMagnitudeImportance(p=2)
    layers: Any = Anatomy.of(smaller).layers
    ratios = {layer.mlp.gate_proj: share for layer in layers}
    ratios |= {layer.mlp.up_proj: share for layer in layers}
    pruner = tp.pruner.BasePruner(
        smaller,
        {"input_ids": batches[0]["input_ids"][:1, :16]},
        importance=ranks,
        pruning_ratio=0.0,
        pruning_ratio_dict=ratios,
        root_module_types=[torch.nn.Linear],
        forward_fn=lambda model, inputs: model(**inputs, use_cache=False).logits,
        round_to=8,
    )
    pruner.step()
    smaller.zero_grad(set_to_none=True)
    smaller.config.intermediate_size = layers[0].mlp.down_proj.in_features
    return smaller.requires_grad_(False).eval()
