"""Keeps 4-bit layers differentiable on a CPU, where bitsandbytes would pack their weights.

On CPUs with bf16 instructions, bitsandbytes (0.50) repacks a 4-bit weight at the first forward in
eval mode. From then on the layer has no gradient with respect to its input, which is a warning at
most; `state_dict` changes the output of some of these layers; and a layer fails if its width is no
multiple of 32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self
from weakref import WeakKeyDictionary

import torch
from torch import nn

PACKS = "support_avx512bf16_for_cpu"
"""The attribute of a 4-bit layer that allows packing it."""

USERS: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
"""How many adapters need each of the unpacked layers."""


@dataclass(frozen=True, eq=False)
class Unpacked:
    """Leaves the model's 4-bit layers unpacked while an adapter is attached."""

    layers: list[nn.Module]

    def connect(self, adapter: nn.Module) -> Self:
        for layer in self.layers:
            unpack(layer)
            USERS[layer] = USERS.get(layer, 0) + 1
            setattr(layer, PACKS, False)
        return self

    def remove(self) -> None:
        """Allow packing the layers again, once no adapter needs them unpacked."""
        for layer in self.layers:
            users = USERS.pop(layer, 1) - 1
            if users:
                USERS[layer] = users
            else:
                setattr(layer, PACKS, True)


def differentiable(model: nn.Module) -> Iterator[Unpacked]:
    """An `Unpacked`, if the model has layers that bitsandbytes may pack."""
    layers = [m for m in model.modules() if m in USERS or getattr(m, PACKS, False)]
    if layers:
        yield Unpacked(layers)


@torch.no_grad()
def unpack(layer: Any) -> None:
    """Undo the packing of a layer that has run before; its scales stay rounded to bf16."""
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        return
    if getattr(state, "packing_format_for_cpu", False):
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

        layer.weight.data, layer.weight.quant_state = _convert_weight_packed_for_cpu_inverse(
            layer.weight.data, state
        )
        state = layer.weight.quant_state
    if not state.nested and state.absmax.dim() == 2:  # packing transposes it, unpacking does not
        state.absmax = state.absmax.T.reshape(-1).float()
