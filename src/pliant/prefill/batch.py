"""Prompts of several lengths in one tensor, aligned so that each ends at the last position.

The next position must follow a prompt's last token, and padding between them is wrong for every
model that counts it (sliding windows, convolutions, recurrence). So padding moves to the left.

Shapes: B prompts, T positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pliant.data.collate import pad_rows
from pliant.errors import InvalidInput

TOKENS_A_BATCH = 8_192


@dataclass(frozen=True, eq=False)
class Batch:
    """Prompts that end together; `mask_BT` is 1 on tokens and 0 on the padding before them."""

    ids_BT: Tensor
    mask_BT: Tensor

    @classmethod
    def of(
        cls, prompts: Sequence[Sequence[int] | Tensor], pad: int = 0, device: Any = None
    ) -> Batch:
        """Lists of ids, padded on the left with `pad`."""
        ids_BT, mask_BT = pad_rows(prompts, pad, side="left")
        return cls(ids_BT.to(device), mask_BT.to(device))

    @property
    def lengths(self) -> list[int]:
        lengths: list[int] = self.mask_BT.sum(dim=1).tolist()
        return lengths

    @property
    def is_ragged(self) -> bool:
        return not bool(self.mask_BT.all())

    def select(self, rows: Sequence[int]) -> Batch:
        """These prompts, without padding that none of them needs."""
        index = torch.as_tensor(rows, device=self.ids_BT.device, dtype=torch.long)
        return _trimmed(self.ids_BT[index], self.mask_BT[index])

    def by_length(self) -> list[list[int]]:
        """The rows, grouped by length, so that no group needs padding."""
        groups: dict[int, list[int]] = {}
        for row, length in enumerate(self.lengths):
            groups.setdefault(length, []).append(row)
        return list(groups.values())


def align(input_ids: Tensor, attention_mask: Tensor | None = None) -> Batch:
    """The batch with all padding on the left, and no more of it than the longest prompt needs."""
    mask_BT = _checked(input_ids, attention_mask)
    # A stable sort brings the padding to the front and leaves the tokens in their order.
    order_BT = mask_BT.argsort(dim=1, stable=True)
    return _trimmed(input_ids.gather(1, order_BT), mask_BT.gather(1, order_BT))


def alike(
    lengths: Sequence[int],
    batch_size: int | None = None,
    equal: bool = False,
    tokens: int = TOKENS_A_BATCH,
) -> Iterator[list[int]]:
    """Batches of prompts of similar (or `equal`) length, each in their order; without a size, up to
    `tokens` at a time."""
    if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
        raise InvalidInput(f"batch_size = {batch_size!r}: give 1 or more")
    rows: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        # Empty prompts run alone: beside others they would be nothing but padding.
        differs = bool(rows) and lengths[rows[-1]] != lengths[i]
        full = len(rows) == batch_size or (differs and (equal or lengths[rows[-1]] == 0))
        if batch_size is None:
            full = full or (len(rows) + 1) * lengths[i] > tokens
        if rows and full:
            yield sorted(rows)
            rows = []
        rows.append(i)
    if rows:
        yield sorted(rows)


def positions(mask_BT: Tensor) -> Tensor:
    """Each token's position as `generate` counts it: from 0, and 0 on the padding."""
    return (mask_BT.long().cumsum(dim=1) - 1).masked_fill(mask_BT == 0, 0)


def _trimmed(ids_BT: Tensor, mask_BT: Tensor) -> Batch:
    longest = int(mask_BT.sum(dim=1).max()) if len(mask_BT) else 0
    start = mask_BT.shape[1] - longest
    return Batch(ids_BT[:, start:], mask_BT[:, start:])


def _checked(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    if input_ids.dim() != 2 or input_ids.is_floating_point():
        raise InvalidInput(
            f"input_ids must be integers of shape (batch, length), not {input_ids.dtype} of shape "
            f"{tuple(input_ids.shape)}"
        )
    if attention_mask is None:
        return torch.ones_like(input_ids)
    if attention_mask.shape != input_ids.shape:
        raise InvalidInput(
            f"attention_mask has shape {tuple(attention_mask.shape)}, and input_ids has "
            f"{tuple(input_ids.shape)}: they must be the same"
        )
    return (attention_mask != 0).to(input_ids)
