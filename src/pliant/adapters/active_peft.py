"""The PEFT adapters that act in a model: what they add to a base that looks like itself without.

A scorer that was trained above a LoRA depends on it as on the base. PEFT is not imported: its
layers are recognised by their attributes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

ZERO_AT_FIRST = ("lora_B", "lora_embedding_B", "svf_z")
"""Parts of a layer that begin at zero, where the layer is its base's."""
NOT_ZERO = ("lora_magnitude_vector",)
"""Parts beside them that count even then: DoRA's."""


@dataclass(frozen=True, eq=False)
class ActiveLayer:
    """One layer of one adapter."""

    path: str
    """Of the module in the base."""
    tensors: dict[str, Tensor]
    """By their names in the layer, without the adapter's."""
    scaling: float


def active_layers(base: nn.Module, ignore: str = "") -> dict[str, list[ActiveLayer]]:
    """The layers of each active adapter that change what the base computes.

    Without adapters that are disabled, merged into the weights, or as new (a LoRA whose B is 0),
    and without those that have a part called `ignore`.
    """
    active: dict[str, list[ActiveLayer]] = {}
    for path, module in base.named_modules():
        for name in _names(module):
            tensors = dict(_tensors(module, name))
            if any(tensor.split(".")[0] == ignore for tensor in tensors):
                continue
            if tensors and not _is_neutral(module, tensors, name):
                scaling = (getattr(module, "scaling", None) or {}).get(name, 1.0)
                active.setdefault(name, []).append(ActiveLayer(path, tensors, float(scaling)))
    return active


def _names(module: Any) -> list[str]:
    """The adapters that act in this module; none if it is no layer of PEFT's."""
    if not hasattr(module, "base_layer") and not hasattr(module, "original_module"):
        return []
    if getattr(module, "disable_adapters", False) or getattr(module, "merged", False):
        return []
    active = getattr(module, "active_adapters", ())
    return [active] if isinstance(active, str) else list(active)


def _tensors(module: nn.Module, name: str) -> Iterator[tuple[str, Tensor]]:
    """An adapter's parameters in a layer: each part of it is a dictionary by adapters."""
    for part, each in module.named_children():
        if isinstance(each, (nn.ModuleDict, nn.ParameterDict)) and name in each:
            own = each[name]
            if isinstance(own, Tensor):
                yield part, own
            else:
                yield from ((f"{part}.{inner}", p) for inner, p in own.named_parameters())


@torch.no_grad()
def _is_neutral(module: Any, tensors: dict[str, Tensor], name: str) -> bool:
    """Whether the layer computes what its base does; an unknown kind of layer never counts as
    that."""
    if any(t.is_meta for t in tensors.values()):
        return False
    parts = {tensor: tensor.split(".")[0] for tensor in tensors}
    if "modules_to_save" in parts.values():
        own = dict(module.original_module.named_parameters())
        inner = ((key.partition(".")[2], t) for key, t in tensors.items())
        return all(key in own and torch.equal(own[key], t) for key, t in inner)
    if "trainable_tokens_delta" in parts.values():
        rows = module.get_base_layer().weight[module.token_indices[name]]
        return torch.equal(rows, tensors["trainable_tokens_delta"])
    zero = [t for key, t in tensors.items() if parts[key] in ZERO_AT_FIRST]
    if not zero or any(part in NOT_ZERO for part in parts.values()):
        return False
    return not any(bool(t.any()) for t in zero)
