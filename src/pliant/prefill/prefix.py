"""One prompt's keys and values, without padding: what is stored, and joined to batches again.

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
"""A cache layer that holds nothing (it was not run, or uses another's keys and values), and one
that holds every position; all others have a window."""

# What stands for a layer that uses another's, in newer versions of transformers.
Dummy: Any = getattr(cache_utils, "DummyLayer", None)


@dataclass(frozen=True, eq=False)
class Prefix:
    """One prompt in a model's cache."""

    length: int
    """In tokens."""
    layers: tuple[int, ...]
    """A cache layer each: EMPTY, GROWING, or the size of its window."""
    tensors: tuple[Tensor, ...]
    """Keys and values, (H, t, K) each, of the layers that are not empty, one after the other."""

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors)


def split(cache: Any, batch: Batch, model: str) -> list[Prefix]:
    """Each prompt's own part of a cache."""
    kinds = kinds_of(cache, model)
    filled = [layer for layer, kind in zip(cache.layers, kinds, strict=True) if kind != EMPTY]
    stacked = [tensor for layer in filled for tensor in (layer.keys, layer.values)]
    prefixes = []
    for row, length in enumerate(batch.lengths):
        own = [t_BHTK[row, :, max(0, t_BHTK.shape[2] - length) :].clone() for t_BHTK in stacked]
        prefixes.append(Prefix(length, kinds, tuple(own)))
    return prefixes


def joined(anatomy: Anatomy, prefixes: Sequence[Prefix]) -> tuple[DynamicCache, Batch]:
    """One cache of several prefixes, and the batch that it stands for, without its ids."""
    if len({prefix.layers for prefix in prefixes}) != 1:
        raise InvalidInput(
            f"{len(prefixes)} prefixes cannot be joined: give some, all of one model at one depth"
        )
    longest = max(prefix.length for prefix in prefixes)
    kinds = prefixes[0].layers
    stacked: list[Tensor] = []
    for index, kind in enumerate(kinds):
        if kind != EMPTY:
            place = device_of(anatomy.layers[min(index, len(anatomy.layers) - 1)])
            held = longest if kind == GROWING else min(longest, kind - 1)
            for _ in range(2):
                at = len(stacked)
                stacked.append(_stacked([p.tensors[at] for p in prefixes], held, place))
    mask = torch.tensor([[0] * (longest - p.length) + [1] * p.length for p in prefixes])
    place = device_of(anatomy.embeddings)
    batch = Batch(torch.zeros_like(mask).to(place), mask.to(place))
    return cache_of(kinds, stacked, longest), batch


def cache_of(kinds: Sequence[int], stacked: Sequence[Tensor], longest: int) -> DynamicCache:
    """A cache with these keys and values, (B, H, T, K) each, of prompts that end together."""
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
    """Of each layer; UnsupportedModel where one prompt's part cannot be taken out."""
    if type(cache) is not DynamicCache:
        raise UnsupportedModel(
            f"{model} keeps its prompts in a {type(cache).__name__}, of which Pliant cannot take "
            "one prompt's part; keys and values in a DynamicCache can be taken apart"
        )
    return tuple(_kind(layer, model) for layer in cache.layers)


def _kind(layer: Any, model: str) -> int:
    if Dummy is not None and type(layer) is Dummy:
        return EMPTY
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
        raise UnsupportedModel(
            f"{model} has a {type(layer).__name__} in its cache, of which Pliant cannot take one "
            "prompt's part; only keys and values can be taken apart"
        )
    if not layer.is_initialized:
        return EMPTY
    return layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else GROWING


def _stacked(parts: Sequence[Tensor], held: int, place: torch.device) -> Tensor:
    """All parts in one tensor, with zeros before the shorter ones."""
    heads, _, features = parts[0].shape
    stacked = torch.zeros(len(parts), heads, held, features, dtype=parts[0].dtype, device=place)
    for row, part in enumerate(parts):
        have = min(part.shape[1], held)
        if have:
            stacked[row, :, held - have :] = part[:, part.shape[1] - have :].to(stacked.device)
    return stacked
