"""Rows of token ids as a batch of tensors, padded to the longest row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pliant.errors import InvalidInput

IGNORED = -100
"""The label of a token that is not trained on, as `cross_entropy` ignores it."""
Side = Literal["left", "right"]


def pad_rows(
    rows: Sequence[Sequence[int] | Tensor], fill: int = 0, side: Side = "right"
) -> tuple[Tensor, Tensor]:
    """(rows, longest) ids, padded with `fill` on one side, and a mask that is 0 on the padding."""
    longest = max(map(len, rows), default=0)
    ids_BT = torch.full((len(rows), longest), fill, dtype=torch.long)
    mask_BT = torch.zeros_like(ids_BT)
    for i, row in enumerate(rows):
        at = slice(longest - len(row), longest) if side == "left" else slice(len(row))
        if len(row):
            ids_BT[i, at] = torch.as_tensor(row)
            mask_BT[i, at] = 1
    return ids_BT, mask_BT


@dataclass(frozen=True)
class Collator:
    """A batch for a causal language model: ids, labels and a mask, padded on the right.

    A row holds `input_ids` and may hold `labels`; without them every token is trained on.
    """

    pad_id: int = 0

    @classmethod
    def of(cls, tokenizer: Any) -> Collator:
        """With the tokenizer's padding token, or its end token where it has none."""
        pad = tokenizer.pad_token_id
        return cls(int(tokenizer.eos_token_id or 0) if pad is None else int(pad))

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        for row in rows:
            _check_row(row)
        ids_BT, mask_BT = pad_rows([row["input_ids"] for row in rows], self.pad_id)
        labels = [row["input_ids" if row.get("labels") is None else "labels"] for row in rows]
        labels_BT, _ = pad_rows(labels, IGNORED)
        return {"input_ids": ids_BT, "labels": labels_BT, "attention_mask": mask_BT}


def _check_row(row: Mapping[str, Any]) -> None:
    if "input_ids" not in row:
        raise InvalidInput(f"a row has no input_ids, only {', '.join(row)}")
    labels = row.get("labels")
    if labels is not None and len(labels) != len(row["input_ids"]):
        raise InvalidInput(f"a row of {len(row['input_ids'])} input_ids has {len(labels)} labels")
