"""In what order a training goes through its prompts: shuffled, with those of like length together.

A batch is as wide as its longest prompt. So prompts are shuffled, dealt into pools of many batches,
sorted by length inside each pool, cut into batches, and the batches are shuffled: a batch's
companions change with every epoch, and its lengths are nearly equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils.data import Sampler

POOL = 50  # batches: wide enough for like lengths, far below an epoch of a large set


class LikeLengths(Sampler[int]):
    """Each epoch another order, the same for one seed and epoch, however it is resumed."""

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
        return iter(in_order(self.lengths, self.batch, self.seed, self.epoch()))


def in_order(lengths: torch.Tensor, batch: int, seed: int, epoch: int) -> list[int]:
    """All prompts once; every `batch` of them in a row are a batch, and the rest comes last."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    shuffled = torch.randperm(len(lengths), generator=generator)
    full = len(shuffled) // batch * batch
    batches: list[torch.Tensor] = []
    for pool in shuffled[:full].split(batch * POOL):
        batches += pool[lengths[pool].argsort(stable=True)].split(batch)
    order = torch.randperm(len(batches), generator=generator).tolist()
    return torch.cat([*(batches[i] for i in order), shuffled[full:]]).tolist()
