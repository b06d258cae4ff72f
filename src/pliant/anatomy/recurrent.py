"""The heads of recurrent mixers: state spaces (Mamba), linear attention, RWKV.

Each head has a state of its own, and the output projection reads them all, as that of attention
does. Mamba decays every channel apart, so that each channel is a head of width 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from pliant.anatomy.blocks import (
    NO_SOFTMAX_TYPES,
    OUTPUT_NAMES,
    Absent,
    Attention,
    Projection,
    find_attention,
    numbers,
    projections,
)

RECURRENT_COUNTS = (
    "num_heads",
    "mamba_num_heads",
    "mamba_n_heads",
    "n_mamba_heads",
    "linear_num_heads",
    "linear_num_value_heads",
    "attention_hidden_size",  # RWKV's channels
)
KEY_COUNTS = ("num_k_heads", "linear_num_key_heads", "n_groups", "mamba_n_groups", "mamba_ngroups")

_DECAYS = ("A_log", "time_decay")
_INPUT_GATE = re.compile(r"^igate")


@dataclass(frozen=True)
class Recurrent:
    """Head h is the features [h * head_dim, (h + 1) * head_dim) of the input of `output`."""

    block: nn.Module
    """The mixer, which runs `output` last."""
    output: nn.Module
    output_name: str
    heads: int
    head_dim: int
    axis: int
    groups: int = 1
    """How many keys (B and C of Mamba) the heads share, each as many heads; 1 also where they have
    none in common."""


def find_recurrent(
    layer: nn.Module, config: Any, linear: tuple[Attention, ...] | Absent
) -> tuple[Recurrent, ...] | Absent:
    """The recurrent mixers of one layer; `linear` is its linear attention, by names."""
    mixers = {r.output_name: r for r in _decaying(layer, config)}
    if not mixers and not isinstance(linear, Absent):
        mixers = {a.output_name: _of_attention(layer, a) for a in linear}
    return tuple(mixers.values()) or Absent("it has no recurrent mixer with an output projection")


def find_linear_attention(
    layer: nn.Module, config: Any, layer_type: str | None
) -> tuple[Attention, ...] | Absent:
    """The linear attention of a layer whose type says that it has no softmax attention."""
    if layer_type is None or not NO_SOFTMAX_TYPES.search(layer_type):
        return Absent("it has no linear attention")
    return find_attention(layer, config, None)


def _decaying(layer: nn.Module, config: Any) -> Iterator[Recurrent]:
    for path, module in layer.named_modules():
        heads = _heads(module)
        # Kimi's decay is a parameter of a module in the mixer.
        for place in (path, path.rpartition(".")[0]) if heads else ():
            block = layer.get_submodule(place)
            output = next(_outputs(place, block, heads), None)
            if output is not None:
                width = output.inputs // heads
                name, axis = output.path, output.axis
                shared = [n for n in numbers(KEY_COUNTS, block, [config]) if heads % n == 0]
                groups = shared[0] if shared else 1
                yield Recurrent(block, output.module, name, heads, width, axis, groups)
                break


def _heads(module: nn.Module) -> int:
    """How many states a module decays apart, by the shape of its decay; 0 if there is none."""
    own: dict[str, Any] = dict(module.named_parameters(recurse=False))
    for name in _DECAYS:
        if name in own:
            return next((size for size in own[name].shape if size > 1), 1)
    for name, child in module.named_children():
        if _INPUT_GATE.search(name) and isinstance(
            size := getattr(child, "out_features", None), int
        ):
            return size
    return 0


def _outputs(path: str, block: nn.Module, heads: int) -> Iterator[Projection]:
    for projection in projections(block, path):
        direct = projection.path.rpartition(".")[0] == path
        named = projection.names[0] in (*OUTPUT_NAMES, "output")
        if direct and named and projection.inputs % heads == 0:
            yield projection


def _of_attention(layer: nn.Module, attention: Attention) -> Recurrent:
    path = attention.output_name.rpartition(".")[0]
    return Recurrent(
        layer.get_submodule(path),
        attention.output,
        attention.output_name,
        attention.heads,
        attention.head_dim,
        attention.axis,
    )
