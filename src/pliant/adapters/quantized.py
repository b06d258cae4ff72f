"""A 4-bit base on a CPU keeps its gradient: bitsandbytes would pack its weights, and lose it.

On CPUs with bf16 instructions, bitsandbytes (seen in 0.50) rewrites a 4-bit weight at the first
forward in eval mode. From then on the layer has no gradient with respect to what goes in, and says
so in a warning at most; `state_dict` leaves some of these layers saying something else; and a
layer whose width is no multiple of 32 fails.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

PACKS = "support_avx512bf16_for_cpu"
"""The attribute of a 4-bit layer that says whether it may be packed."""


KEPT: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
"""The layers that are kept unpacked, and by how many adapters."""


@dataclass(frozen=True, eq=False)
class Unpacked:
    """A wire: the model's 4-bit layers are not packed while an adapter is attached."""

    model: nn.Module

    def connect(self, adapter: nn.Module) -> Restored:
        layers = [layer for layer in self.model.modules() if _is_packable(layer)]
        for layer in layers:
            unpack(layer)
            KEPT[layer] = KEPT.get(layer, 0) + 1
            setattr(layer, PACKS, False)
        return Restored(layers)


@dataclass(frozen=True, eq=False)
class Restored:
    """Takes the wire out: once nobody needs them otherwise, the layers may be packed again."""

    layers: list[nn.Module]

    def remove(self) -> None:
        for layer in self.layers:
            left = KEPT.pop(layer, 1) - 1
            if left:
                KEPT[layer] = left
            else:
                setattr(layer, PACKS, True)


def differentiable(model: nn.Module) -> Iterator[Unpacked]:
    """The wire, if the model has layers that may be packed."""
    if any(_is_packable(layer) for layer in model.modules()):
        yield Unpacked(model)


def _is_packable(layer: nn.Module) -> bool:
    return layer in KEPT or bool(getattr(layer, PACKS, False))


@torch.no_grad()
def unpack(layer: Any) -> None:
    """Undo the packing of a layer that has run before; the scales stay in the bf16 that they were
    rounded to then."""
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        return
    if getattr(state, "packing_format_for_cpu", False):
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

        layer.weight.data, layer.weight.quant_state = _convert_weight_packed_for_cpu_inverse(
            layer.weight.data, state
        )
        state = layer.weight.quant_state
    if not state.nested and state.absmax.dim() == 2:  # transposed, and left so
        state.absmax = state.absmax.T.reshape(-1).float()
