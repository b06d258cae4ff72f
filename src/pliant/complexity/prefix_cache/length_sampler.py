"""The order of prompts in training: shuffled, with prompts of similar length in one batch.

A batch is as wide as its longest prompt. So prompts are shuffled, divided into pools of many
batches, sorted by length within each pool and divided into batches, which are shuffled again. The
prompts of a batch change every epoch, and their lengths are nearly equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils.data import Sampler

POOL = 50  # batches: enough for similar lengths, much less than an epoch of a large data set


class SimilarLengthSampler(Sampler[int]):
    """A new order each epoch; the same for one seed and epoch, so that a run resumes exactly."""

    def __init__(
        self, lengths: Sequence[int], batch: int, seed: int, epoch: Callable[[], int]
    ) -> None:
        self.lengths = torch.as_tensor(lengths)
        self.batch = batch
        self.seed = seed
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        return iter(similar_length_order(self.lengths, self.batch, self.seed, self.epoch()))


def similar_length_order(lengths: torch.Tensor, batch: int, seed: int, epoch: int) -> list[int]:
    """All prompts once; each run of `batch` of them is a batch, and the remainder comes last."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    shuffled = torch.randperm(len(lengths), generator=generator)
    full = len(shuffled) // batch * batch
    batches: list[torch.Tensor] = []
    for pool in shuffled[:full].split(batch * POOL):
        batches += pool[lengths[pool].argsort(stable=True)].split(batch)
    order = torch.randperm(len(batches), generator=generator).tolist()
    return torch.cat([*(batches[i] for i in order), shuffled[full:]]).tolist()
