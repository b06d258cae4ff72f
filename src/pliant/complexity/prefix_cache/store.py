"""The prompts' keys and values, computed once and used by every epoch of a training.

    stored = remember(scorer, ids)           # in memory, or in a folder
    prefilled = stored.batch([3, 0, 7]).to_prefilled(scorer)
    scorer.logits_of(prefilled)

[CPX] comes last and attention is causal, so a prompt's keys and values depend on nothing that is
trained. They are stored without padding, a row for each token, the shortest prompts first.

Shapes: B prompts, T positions, H heads, K features of a head; N rows, one for each stored token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pliant.complexity.prefix_cache.append_in_place import Appendable
from pliant.complexity.scorer import PromptScorer
from pliant.errors import UnsupportedModel
from pliant.prefill import Batch, ForwardResult, Prefilled, Prefix, alike, supports_padding
from pliant.prefill.batch import TOKENS_A_BATCH
from pliant.prefill.prefilled import EMPTY, GROWING, Part, cache_of, kinds_of

RunPrompts = Callable[[Tensor, Tensor], Prefilled]
"""(B, T) ids and mask, on the CPU -> the prefilled prompts."""


@dataclass(frozen=True, eq=False)
class Layout:
    """The layout of the stored rows, for each kind of cache layer."""

    kinds: tuple[int, ...]
    """The kind of each cache layer, as in `Prefix.layers`."""
    shapes: tuple[tuple[int, int], ...]
    """(H, K) of each stored tensor: keys and values of the layers that are not empty."""

    @property
    def slots(self) -> list[int]:
        """The kind of each stored tensor."""
        return [kind for kind in self.kinds if kind != EMPTY for _ in range(2)]

    def bytes(self, lengths: Tensor, item: int) -> int:
        """The size of prompts of these lengths, with `item` bytes a number."""
        pairs = zip(self.slots, self.shapes, strict=True)
        return sum(int(self.held(kind, lengths).sum()) * h * k * item for kind, (h, k) in pairs)

    def held(self, kind: int, lengths: Tensor) -> Tensor:
        """How many rows a prompt has there: a sliding window drops the rest."""
        return lengths if kind == GROWING else lengths.clamp(max=kind - 1)


@dataclass(frozen=True, eq=False)
class Chunk:
    """The rows of some prompts: in memory, or mapped from a file."""

    lengths: Tensor
    rows: tuple[Tensor, ...]
    """(N, H * K) of each stored tensor."""

    @property
    def bytes(self) -> int:
        return sum(rows.numel() * rows.element_size() for rows in self.rows)

    def starts(self, layout: Layout, kind: int) -> Tensor:
        held = layout.held(kind, self.lengths)
        return held.cumsum(0) - held


@dataclass(frozen=True, eq=False)
class PrefixStore:
    """The keys and values of n prompts."""

    layout: Layout
    chunks: tuple[Chunk, ...]
    position: Tensor
    """(n,) each prompt's index among those of all chunks, which are in order of length."""
    where: str
    """memory or disk."""
    capacity: int = 0
    """Free positions behind each prompt in a batch, for the scorer's rows."""

    def __len__(self) -> int:
        return len(self.position)

    @property
    def bytes(self) -> int:
        return sum(chunk.bytes for chunk in self.chunks)

    def select(self, indices: Sequence[int] | Tensor) -> PrefixStore:
        """A selection of the prompts, in this order, stored where they are."""
        return replace(self, position=self.position[torch.as_tensor(indices)])

    def with_capacity(self, rows: int) -> PrefixStore:
        """The same, with free positions for a scorer of this many rows."""
        return replace(self, capacity=rows)

    def joined(self, more: PrefixStore) -> PrefixStore:
        """The prompts of both, these first; both in memory, of one base run to one depth."""
        (own,), (other,) = self.chunks, more.chunks
        layout, chunk = concatenated([(self.layout, own), (more.layout, other)])
        position = torch.cat([self.position, more.position + len(own.lengths)])
        return replace(self, layout=layout, chunks=(chunk,), position=position)

    def batch(self, indices: Sequence[int] | Tensor) -> PrefixBatch:
        """A selection of the prompts, in this order, as one padded batch."""
        at = self.position[torch.as_tensor(indices)]
        if len(self.chunks) == 1:
            return self._batch_from_memory(at)
        return self._batch_from_files(at)

    def _batch_from_memory(self, at: Tensor) -> PrefixBatch:
        """One gather for each stored tensor; a prompt is padded with a row of its own, masked."""
        (chunk,) = self.chunks
        lengths, index = chunk.lengths[at], {}
        for kind, starts in self._chunk_starts[0].items():
            held = self.layout.held(kind, lengths)
            width = int(held.max())
            free = self.capacity if width else 0  # these are written over
            back = torch.arange(width + free) - (width - held)[:, None]
            own = back.minimum(held[:, None] - 1).clamp(min=0)
            index[kind] = (starts[at][:, None] + own).reshape(-1)
        tensors = []
        for slot, rows, shape in zip(
            self.layout.slots, chunk.rows, self.layout.shapes, strict=True
        ):
            gathered = rows.index_select(0, index[slot]).view(len(at), -1, *shape)
            tensors.append(gathered.transpose(1, 2))
        return PrefixBatch(tuple(tensors), tuple(lengths.tolist()), self.layout.kinds)

    def _batch_from_files(self, at: Tensor) -> PrefixBatch:
        """Slices of the mapped files: only these are read."""
        which = torch.searchsorted(self._ends, at, right=True)
        places = list(zip(which.tolist(), (at - self._firsts[which]).tolist(), strict=True))
        lengths = torch.stack([self.chunks[c].lengths[i] for c, i in places])
        tensors = []
        for slot, kind in enumerate(self.layout.slots):
            held = self.layout.held(kind, lengths).tolist()
            rows = self.chunks[0].rows[slot]
            width = max(held)
            free = self.capacity if width else 0
            out = rows.new_zeros(len(places), width + free, rows.shape[1])
            for b, ((c, i), have) in enumerate(zip(places, held, strict=True)):
                start = int(self._chunk_starts[c][kind][i])
                out[b, width - have : width] = self.chunks[c].rows[slot][start : start + have]
            shape = self.layout.shapes[slot]
            tensors.append(out.view(*out.shape[:2], *shape).transpose(1, 2))
        return PrefixBatch(tuple(tensors), tuple(lengths.tolist()), self.layout.kinds)

    @cached_property
    def _chunk_starts(self) -> list[dict[int, Tensor]]:
        kinds = set(self.layout.slots)
        return [{kind: c.starts(self.layout, kind) for kind in kinds} for c in self.chunks]

    @cached_property
    def _ends(self) -> Tensor:
        return torch.tensor([len(chunk.lengths) for chunk in self.chunks]).cumsum(0)

    @cached_property
    def _firsts(self) -> Tensor:
        return torch.cat([torch.zeros(1, dtype=torch.long), self._ends[:-1]])


@dataclass(frozen=True, eq=False)
class PrefixBatch:
    """The keys and values of a batch of stored prompts."""

    tensors: tuple[Tensor, ...]
    """(B, H, T, K) keys and values of the layers that are not empty, padded on the left; with free
    positions behind them, where there are any."""
    lengths: tuple[int, ...]
    kinds: tuple[int, ...]

    def as_dict(self) -> dict[str, Any]:
        """As part of a Trainer's batch: the Trainer moves the tensors to their device."""
        return {"tensors": self.tensors, "lengths": self.lengths, "kinds": self.kinds}

    def to_prefilled(self, scorer: PromptScorer) -> Prefilled:
        """For one step of the scorer, whose rows may be written into the free positions."""
        anatomy, layers = scorer.anatomy, scorer.config.layer
        longest = max(self.lengths)
        if min(self.lengths) < longest and not supports_padding(anatomy):
            return Prefilled.join(anatomy, self.split(), layers=layers)
        padding = torch.tensor([longest - length for length in self.lengths])
        mask = (torch.arange(longest) >= padding[:, None]).long().to(self.tensors[0].device)
        batch = Batch(torch.zeros_like(mask), mask)
        pairs = zip(self.tensors, self._slots, strict=True)
        tensors = [Appendable.of(t, self._held(kind, longest)) for t, kind in pairs]
        cache = cache_of(self.kinds, tensors, longest)
        ran = ForwardResult(None, cache, "past_key_values")
        return Prefilled(anatomy, layers, batch, (Part(None, batch, ran),))

    def split(self) -> list[Prefix]:
        """Each prompt alone."""
        prefixes, longest = [], max(self.lengths)
        for b, length in enumerate(self.lengths):
            own = []
            for t_BHTK, kind in zip(self.tensors, self._slots, strict=True):
                ends = self._held(kind, longest)
                own.append(t_BHTK[b, :, ends - self._held(kind, length) : ends])
            prefixes.append(Prefix(length, self.kinds, tuple(own)))
        return prefixes

    @property
    def _slots(self) -> list[int]:
        return [kind for kind in self.kinds if kind != EMPTY for _ in range(2)]

    @staticmethod
    def _held(kind: int, length: int) -> int:
        return length if kind == GROWING else min(length, kind - 1)


# --- filling -------------------------------------------------------------------------------------


def by_length(ids: Sequence[Tensor]) -> list[int]:
    """The prompts' indices, the shortest first, so that neighbors need hardly any padding."""
    return sorted(range(len(ids)), key=lambda i: len(ids[i]))


def batches(
    ids: Sequence[Tensor], order: Sequence[int], tokens: int = TOKENS_A_BATCH
) -> Iterator[list[int]]:
    """Prompts in this order, the shortest first, as many at a time as `tokens` allow."""
    for rows in alike([len(ids[i]) for i in order], tokens=tokens):
        yield [order[row] for row in rows]


def rows_of(prefilled: Prefilled) -> tuple[Layout, Chunk]:
    """A batch's keys and values without padding; UnsupportedModel where they cannot be separated.

    Where the model does not support padding, the batch has several parts, each of one length.
    """
    model = type(prefilled.anatomy.model).__name__
    return concatenated(_rows_of_part(part, model) for part in prefilled.parts)


def _rows_of_part(part: Part, model: str) -> tuple[Layout, Chunk]:
    cache = part.result.cache
    if cache is None:
        raise UnsupportedModel(f"{model} has no cache that could be stored")
    kinds = kinds_of(cache, model)
    mask_BT, rows, shapes = part.batch.mask_BT.bool(), [], []
    for kind, layer in zip(kinds, cache.layers, strict=True):
        for t_BHTK in (layer.keys, layer.values) if kind != EMPTY else ():
            held_BT = mask_BT[:, mask_BT.shape[1] - t_BHTK.shape[2] :].to(t_BHTK.device)
            own = t_BHTK.transpose(1, 2)[held_BT]
            shapes.append((own.shape[1], own.shape[2]))
            rows.append(own.flatten(1).cpu())
    return Layout(kinds, tuple(shapes)), Chunk(mask_BT.sum(dim=1).cpu(), tuple(rows))


def computed(
    run: RunPrompts, ids: Sequence[Tensor], order: Sequence[int]
) -> Iterator[tuple[Layout, Chunk]]:
    """The rows of the prompts in this order, batch by batch."""
    for rows in batches(ids, order):
        batch = Batch.of([ids[i] for i in rows])
        with torch.no_grad():
            yield rows_of(run(batch.ids_BT, batch.mask_BT))


def in_memory(run: RunPrompts, ids: Sequence[Tensor]) -> PrefixStore:
    """All prompts in one chunk."""
    order = by_length(ids)
    layout, chunk = concatenated(computed(run, ids, order))
    return PrefixStore(layout, (chunk,), torch.tensor(order).argsort(), "memory")


def concatenated(batches: Iterable[tuple[Layout, Chunk]]) -> tuple[Layout, Chunk]:
    """One chunk of several, one tensor at a time: hardly more than one is ever in memory twice."""
    layouts, lengths, stacks = [], [], []
    for layout, chunk in batches:
        layouts.append(layout)
        lengths.append(chunk.lengths)
        stacks.append(list(chunk.rows))
    rows = [torch.cat([stack.pop(0) for stack in stacks]) for _ in layouts[0].slots]
    return layouts[0], Chunk(torch.cat(lengths), tuple(rows))
