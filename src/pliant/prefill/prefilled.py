"""A batch of prompts that was run: its hidden states and cache, and what can run on top of them.

`Prefix` holds the keys and values of one prompt, which can be stored and joined to batches.

Shapes: B prompts, T positions, r new ones, D features, V tokens of the vocabulary; H heads of K
features, t positions of one prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, cache_utils
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from pliant.anatomy import Anatomy
from pliant.anatomy.cache_copy import copy_state
from pliant.anatomy.decoder import last_hidden_state
from pliant.anatomy.find import device_of
from pliant.errors import InvalidInput, UnsupportedModel
from pliant.prefill.batch import Batch, align
from pliant.prefill.forward import (
    ForwardResult,
    StepContext,
    cache_in,
    groups,
    inputs_of,
    no_context,
    on_cache,
    on_top,
    run,
    run_layers,
    supports_cache,
)


def prefill(
    model: nn.Module | Anatomy,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    layers: int | None = None,
    head: bool = True,
    resumable: bool = True,
    grad: bool = False,
    **inputs: Any,
) -> Prefilled:
    """Run a batch of prompts through `model`, or through its first `layers`.

    Padding may be on either side. Without `head` there are no logits, and with `resumable=False` an
    early exit stores nothing for `resume`. `inputs` go to the model unchanged.
    """
    anatomy = model if isinstance(model, Anatomy) else Anatomy.of(model)
    batch = align(input_ids, attention_mask)
    use_cache = supports_cache(anatomy)
    parts = []
    with torch.set_grad_enabled(grad):
        for rows in groups(anatomy, batch):
            part = batch if rows is None else batch.select(rows)
            kwargs = {**inputs_of(anatomy, part), **inputs, "use_cache": use_cache}
            if layers is None:
                result = run(anatomy, kwargs, head=head)
            else:
                result = run_layers(anatomy, layers, kwargs, resumable=resumable)
            parts.append(Part(rows, part, result))
    return Prefilled(anatomy, layers, batch, tuple(parts), inputs)


@dataclass(frozen=True, eq=False)
class Prefilled:
    """A batch of prompts that a model, or its first layers, has run."""

    anatomy: Anatomy = field(repr=False)
    layers: int | None
    """The number of layers that ran; None for all."""
    batch: Batch
    parts: tuple[Part, ...] = field(repr=False)
    """One, unless prompts of different lengths had to run separately."""
    inputs: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def input_ids(self) -> Tensor:
        """The prompts, padded on the left."""
        return self.batch.ids_BT

    @property
    def attention_mask(self) -> Tensor:
        return self.batch.mask_BT

    @property
    def logits(self) -> Tensor | None:
        """(B, V), of the last token; None after an early exit, until `resume`."""
        return self._gather(lambda part: part.result.logits_BV)

    @property
    def hidden(self) -> Tensor | None:
        """(B, D), of the last token after the final norm, as if the model ended here."""
        return self._gather(lambda part: part.result.last_BD)

    @property
    def cache(self) -> Any:
        """A copy of the cache, to continue from; None if the model does not support its cache."""
        if len(self.parts) != 1:
            raise UnsupportedModel(
                f"{self._name} does not support padding on the left, so these prompts of several "
                "lengths have no cache in common: run one length at a time"
            )
        return copy_state(self.parts[0].result.cache)

    def step(self, ids: Tensor, step_context: StepContext = no_context) -> Tensor:
        """The hidden states (B, r, D), after the norm, of (B, r) ids on top of the prompts.

        The cache stays unchanged. Gradients flow to whatever hooks write at the new positions.
        `step_context(i, j, shape)` is entered around the forward of positions i to j - 1.
        """
        if ids.dim() != 2 or ids.shape[0] != len(self.input_ids) or ids.shape[1] == 0:
            raise InvalidInput(
                f"ids must be of shape ({len(self.input_ids)}, 1 or more), not {tuple(ids.shape)}"
            )
        hidden = self._gather(lambda part: part.step(self, part.rows_of(ids), step_context))
        assert hidden is not None
        return hidden

    def resume(self, *, head: bool = True) -> Prefilled:
        """Run the remaining layers after an early exit: bit for bit the full prefill.

        Without `head` there are no logits. It may be called again, for other adapters, say, that
        act on the remaining layers alone.
        """
        if self.layers is None:
            return self
        parts = tuple(Part(p.rows, p.batch, _resume(p.result, head)) for p in self.parts)
        return Prefilled(self.anatomy, None, self.batch, parts, self.inputs)

    def split(self) -> list[Prefix]:
        """Each prompt's keys and values, without padding; `join` makes a batch of them again."""
        prefixes: dict[int, Prefix] = {}
        for part in self.parts:
            rows = range(len(self.input_ids)) if part.rows is None else part.rows
            if part.result.cache is None:
                raise UnsupportedModel(f"{self._name} has no cache that can be split")
            split_cache = split(part.result.cache, part.batch, self._name)
            prefixes.update(zip(rows, split_cache, strict=True))
        return [prefixes[row] for row in sorted(prefixes)]

    @classmethod
    def join(
        cls, model: nn.Module | Anatomy, prefixes: Sequence[Prefix], *, layers: int | None = None
    ) -> Prefilled:
        """A batch of prompts from `split`, of any lengths, ready for `step`; its ids are zeros."""
        anatomy = model if isinstance(model, Anatomy) else Anatomy.of(model)
        if not prefixes:
            raise InvalidInput("no prefixes to join: give at least one")
        batch, parts = batch_of(prefixes, device_of(anatomy.embeddings)), []
        for rows in groups(anatomy, batch):
            members = prefixes if rows is None else [prefixes[row] for row in rows]
            cache, part = join(anatomy, members)
            parts.append(Part(rows, part, ForwardResult(None, cache, "past_key_values")))
        return cls(anatomy, layers, batch, tuple(parts))

    def _gather(self, of: Callable[[Part], Tensor | None]) -> Tensor | None:
        """The parts' tensors as one, in the order of the prompts."""
        tensors = [tensor for part in self.parts if (tensor := of(part)) is not None]
        if self.parts[0].rows is None or not tensors:
            return tensors[0] if tensors else None
        rows = [row for part in self.parts for row in part.rows or ()]
        gathered = torch.cat(tensors)
        return gathered[torch.tensor(rows, device=gathered.device).argsort()]

    @property
    def _name(self) -> str:
        return type(self.anatomy.model).__name__


@dataclass(frozen=True, eq=False)
class Part:
    """Prompts that ran together."""

    rows: list[int] | None
    """Their rows of the batch; None for all, in order."""
    batch: Batch
    result: ForwardResult

    def rows_of(self, ids: Tensor) -> Tensor:
        ids = ids.to(self.batch.ids_BT.device)
        return ids if self.rows is None else ids[torch.tensor(self.rows, device=ids.device)]

    def step(self, prefilled: Prefilled, ids_Br: Tensor, step_context: StepContext) -> Tensor:
        anatomy = prefilled.anatomy
        options: Any = {"layers": prefilled.layers, "step_context": step_context}
        if self.result.cache is None:
            return on_top(anatomy, self.batch, ids_Br, **options, **prefilled.inputs)
        return on_cache(anatomy, self.batch, self.result, ids_Br, **options)


def _resume(result: ForwardResult, head: bool) -> ForwardResult:
    assert result.first is not None
    if not head:
        decoded = result.first.resume_decoder()
        return ForwardResult(last_hidden_state(decoded), *cache_in(decoded))
    decoded, output = result.first.resume_both()
    cache, name = cache_in(output)
    hidden, logits = last_hidden_state(decoded), output.logits[:, -1]
    return ForwardResult(hidden, cache, name, logits, output=output)


# --- prefixes -------------------------------------------------------------------------------------

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
