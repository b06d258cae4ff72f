"""How large a model is, and what each part of Pliant would add to it, from its shapes alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pliant.anatomy import Anatomy
from pliant.anatomy.config import read
from pliant.anatomy.depth import cache_name
from pliant.anatomy.projection import projections

BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0, "int4": 0.5}
CPX_ROWS, CPX_LABELS = 4, 1


@dataclass(frozen=True)
class Sizes:
    """What there is of each kind."""

    parameters: int
    embedding_parameters: int
    """Of the embeddings, and of the head where it is not tied to them."""
    layer_parameters: tuple[int, ...]
    bytes: dict[str, int]
    """Of all weights, by precision; int8 and int4 without their scales."""
    vocabulary: int
    hidden_size: int
    layers: int
    attention_layers: int
    heads: tuple[int, ...]
    """The numbers of heads that occur, as those of key heads below."""
    kv_heads: tuple[int, ...]
    cache_bytes_per_token: int
    """Keys and values in bf16, while no sliding window is full."""
    state_bytes: int
    """Recurrent and convolutional states of one sequence, in bf16."""


@dataclass(frozen=True)
class Estimate:
    """Memory that a part would add; an estimate by a formula, nothing was allocated."""

    part: str
    what: str
    bytes: int
    formula: str


def sizes_of(anatomy: Anatomy) -> Sizes:
    """The sizes of a model that may well be on the meta device."""
    total = _parameters(anatomy.model)
    count = len(anatomy.layers)
    blocks = [block for i in range(count) for block in anatomy.attentions(i)]
    per_token, state = cache_numbers(anatomy)
    table: Any = anatomy.embeddings
    return Sizes(
        parameters=total,
        embedding_parameters=_parameters(*filter(None, [anatomy.embeddings, anatomy.head])),
        layer_parameters=tuple(_parameters(layer) for layer in anatomy.layers),
        bytes={name: math.ceil(total * size) for name, size in BYTES.items()},
        vocabulary=int(
            getattr(table, "num_embeddings", 0) or read(anatomy.config, "vocab_size") or 0
        ),
        hidden_size=anatomy.hidden_size,
        layers=count,
        attention_layers=sum(anatomy.attention(i) is not None for i in range(count)),
        heads=tuple(sorted({block.heads for block in blocks})),
        kv_heads=tuple(sorted({block.kv_heads for block in blocks})),
        cache_bytes_per_token=2 * per_token,
        state_bytes=2 * state,
    )


def estimates_of(anatomy: Anatomy, sizes: Sizes) -> tuple[Estimate, ...]:
    """What each part would add, in bytes, with the formula."""
    blocks = [b for i in range(sizes.layers) for b in anatomy.attentions(i)]
    gates = sum(block.heads for block in blocks) + sizes.layers
    matrices = [p for layer in anatomy.layers for p in projections(layer)]
    ranks = [min(p.inputs, p.outputs) for p in matrices]
    rows, d, labels = CPX_ROWS, sizes.hidden_size, CPX_LABELS
    return (
        Estimate(
            "complexity",
            "the [CPX] rows and the score head",
            4 * (rows * d + d * labels),
            f"({rows} rows x {d} + {d} x {labels} label) x 4 bytes",
        ),
        Estimate(
            "structure",
            "a gate for every head and layer",
            4 * gates,
            f"({gates - sizes.layers} heads + {sizes.layers} layers) x 4 bytes",
        ),
        Estimate(
            "experts",
            "one expert on every projection",
            4 * sum(ranks),
            f"sum of min(in, out) over {len(ranks)} projections x 4 bytes",
        ),
        Estimate(
            "experts",
            "the bases that all experts share",
            2 * sum(rank * rank for rank in ranks),
            f"sum of min(in, out)^2 over {len(ranks)} projections, in bf16",
        ),
        Estimate(
            "gradients",
            "kept keys and values, for each token of a batch",
            sizes.cache_bytes_per_token,
            "the cache of one token, in bf16",
        ),
    )


@torch.no_grad()
def cache_numbers(anatomy: Anatomy) -> tuple[int, int]:
    """How many numbers a cache holds for each token, and how many whatever the length.

    On the meta device the decoder's own forward costs nothing and leaves a cache of shapes. Where
    it cannot run there, it is as many numbers as keys and values have heads.
    """
    embedded = next(anatomy.embeddings.parameters())
    if embedded.is_meta:
        ids = torch.zeros((1, 2), dtype=torch.long, device="meta")
        try:
            output = anatomy.decoder(input_ids=ids, use_cache=True)
            return _held(getattr(output, cache_name(output) or ""), tokens=2)
        except Exception:
            pass  # some forwards look at the data, which is not there
    return _cache_by_formula(anatomy), 0


def _held(cache: Any, tokens: int) -> tuple[int, int]:
    per_token = state = 0
    for layer in cache.layers:
        for name, value in vars(layer).items():
            if name in ("keys", "values"):
                per_token += _numbers(value) // tokens
            else:
                state += _numbers(value)
    return per_token, state


def _numbers(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() if value.dim() > 1 else 0  # a position is no state
    if isinstance(value, dict):
        value = list(value.values())
    return sum(map(_numbers, value)) if isinstance(value, (list, tuple)) else 0


def _cache_by_formula(anatomy: Anatomy) -> int:
    """Keys as wide as values; layers that share another's keys (Gemma 3n) keep none."""
    keeping = len(anatomy.layers) - (read(anatomy.config, "num_kv_shared_layers") or 0)
    blocks = [block for i in range(keeping) for block in anatomy.attentions(i)]
    return sum(2 * block.kv_heads * block.head_dim for block in blocks)


def _parameters(*modules: nn.Module) -> int:
    """Every weight once: tied ones are one tensor."""
    once = {id(p): p for module in modules for p in module.parameters()}
    return sum(p.numel() for p in once.values())
