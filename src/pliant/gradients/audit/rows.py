"""Rows of token ids as a batch: padded on the right, and the padding masked and not learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pliant.errors import InvalidInput
from pliant.gradients.batch import IGNORED


def padded(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Each row holds `input_ids` and may hold `labels`; without these it is learned as a whole."""
    ids = [_list(row, "input_ids") for row in rows]
    labels = [
        ours if row.get("labels") is None else _list(row, "labels")
        for ours, row in zip(ids, rows, strict=True)
    ]
    for ours, theirs in zip(ids, labels, strict=True):
        if len(ours) != len(theirs):
            raise InvalidInput(f"a row of {len(ours)} input_ids has {len(theirs)} labels")
    width = max(map(len, ids))
    return {
        "input_ids": _even(ids, width, 0),
        "labels": _even(labels, width, IGNORED),
        "attention_mask": _even([[1] * len(one) for one in ids], width, 0),
    }


def _list(row: Mapping[str, Any], name: str) -> list[int]:
    if name not in row:
        raise InvalidInput(f"a row has no {name}, only {', '.join(row)}")
    value = row[name]
    return value.tolist() if hasattr(value, "tolist") else list(value)


def _even(rows: Sequence[list[int]], width: int, fill: int) -> Tensor:
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows])
