"""One prompt's keys and values, without padding, which can be stored and joined to batches.

Shapes: B prompts, H heads, t positions of one prompt, T of the batch, K features of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, cache_utils
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from pliant.anatomy import Anatomy
from pliant.anatomy.find import device_of
from pliant.errors import InvalidInput, UnsupportedModel
from pliant.prefill.batch import Batch

EMPTY, GROWING = -1, 0
"""A cache layer that is empty (it was not run, or uses another layer's keys and values), and one
that holds every position; all others have a window."""

# Newer versions of transformers have a class for a layer that uses another layer's keys and values.
Dummy: Any = getattr(cache_utils, "DummyLayer", None)


@dataclass(frozen=True, eq=False)
class Prefix:
    """One prompt in a model's cache."""

    length: int
    """In tokens."""
    layers: tuple[int, ...]
    """For each cache layer EMPTY, GROWING, or the size of its window."""
    tensors: tuple[Tensor, ...]
    """Keys and values in turn, (H, t, K) each, of the layers that are not empty."""

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors)


def split(cache: Any, batch: Batch, model: str) -> list[Prefix]:
    """Each prompt's part of a cache."""
    kinds = kinds_of(cache, model)
    filled = [layer for layer, kind in zip(cache.layers, kinds, strict=True) if kind != EMPTY]
    stacked = [tensor for layer in filled for tensor in (layer.keys, layer.values)]
    prefixes = []
    for row, length in enumerate(batch.lengths):
        own = [t_BHTK[row, :, max(0, t_BHTK.shape[2] - length) :].clone() for t_BHTK in stacked]
        prefixes.append(Prefix(length, kinds, tuple(own)))
    return prefixes


def join(anatomy: Anatomy, prefixes: Sequence[Prefix]) -> tuple[DynamicCache, Batch]:
    """One cache of several prefixes, and their batch, with zeros for ids."""
    if len({prefix.layers for prefix in prefixes}) != 1:
        raise InvalidInput(
            f"{len(prefixes)} prefixes cannot be joined: they must come from one model, run to one "
            "depth"
        )
    longest = max(prefix.length for prefix in prefixes)
    kinds = prefixes[0].layers
    stacked: list[Tensor] = []
    for index, kind in enumerate(kinds):
        if kind != EMPTY:
            device = device_of(anatomy.layers[min(index, len(anatomy.layers) - 1)])
            positions = longest if kind == GROWING else min(longest, kind - 1)
            for _ in range(2):
                at = len(stacked)
                stacked.append(_stack([p.tensors[at] for p in prefixes], positions, device))
    return cache_of(kinds, stacked, longest), batch_of(prefixes, device_of(anatomy.embeddings))


def batch_of(prefixes: Sequence[Prefix], device: torch.device) -> Batch:
    """The batch of the prefixes' prompts, with zeros for ids."""
    longest = max(prefix.length for prefix in prefixes)
    mask = torch.tensor([[0] * (longest - p.length) + [1] * p.length for p in prefixes])
    return Batch(torch.zeros_like(mask).to(device), mask.to(device))


def cache_of(kinds: Sequence[int], stacked: Sequence[Tensor], longest: int) -> DynamicCache:
    """A cache of these keys and values, (B, H, T, K) each, of prompts that end together."""
    cache, pairs = DynamicCache(), iter(zip(stacked[::2], stacked[1::2], strict=True))
    cache.layers = []
    for kind in kinds:
        layer = DynamicLayer() if kind <= GROWING else DynamicSlidingWindowLayer(kind)
        if kind != EMPTY:
            keys, values = next(pairs)
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
            if isinstance(layer, DynamicSlidingWindowLayer):
                layer.cumulative_length = longest
        cache.layers.append(layer)
    cache.layer_class_to_replicate = None
    return cache


def kinds_of(cache: Any, model: str) -> tuple[int, ...]:
    """The kind of each cache layer; UnsupportedModel if the cache cannot be split by prompts."""
    if type(cache) is not DynamicCache:
        raise UnsupportedModel(
            f"{model} has a {type(cache).__name__}, which Pliant cannot split by prompts; it can "
            "split the keys and values in a DynamicCache"
        )
    return tuple(_kind(layer, model) for layer in cache.layers)


def _kind(layer: Any, model: str) -> int:
    if Dummy is not None and type(layer) is Dummy:
        return EMPTY
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
        raise UnsupportedModel(
            f"{model} has a {type(layer).__name__} in its cache, which Pliant cannot split by "
            "prompts; it can split keys and values"
        )
    if not layer.is_initialized:
        return EMPTY
    return layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else GROWING


def _stack(prompts: Sequence[Tensor], positions: int, device: torch.device) -> Tensor:
    """One tensor of the last positions of each prompt, with zeros before the shorter ones."""
    heads, _, features = prompts[0].shape
    shape = (len(prompts), heads, positions, features)
    stacked = torch.zeros(shape, dtype=prompts[0].dtype, device=device)
    for row, prompt in enumerate(prompts):
        length = min(prompt.shape[1], positions)
        if length:
            stacked[row, :, positions - length :] = prompt[:, prompt.shape[1] - length :].to(device)
    return stacked
