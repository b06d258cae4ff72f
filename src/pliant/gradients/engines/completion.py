"""Fine-tuning: the prompt runs once without gradient, and only the completion trains.

The gradient stops at the prompt's keys and values; everything from the first labelled token on has
all of its own. Nothing is scored and nothing is left out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pliant.gradients.engines.kv import extended
from pliant.gradients.engines.sparse import first_pass, second_pass
from pliant.gradients.engines.split_forward import SplitForward


def completion(
    split: SplitForward, inputs: dict[str, Any], valid_BT: Tensor, *, always: bool = False
) -> Any | None:
    """What the decoder returns, right from each row's first to its last valid position.

    None where there is no prompt to spare: rows are labelled from their start on, or none is. With
    `always`, two passes are made even so, as other processes may make them (see `sharded`).
    """
    length = valid_BT.shape[1]
    first_B = torch.where(valid_BT.any(1), valid_BT.int().argmax(1), length)
    labelled_B = first_B < length
    prompt = int(first_B[labelled_B].max()) if bool(labelled_B.any()) else 0
    if prompt == 0 and not always:
        return None
    prompt = max(1, prompt)
    end = max(prompt, length - int(valid_BT.any(0).flip(0).int().argmax()))
    at_BK, live_BK = _from_first_on(valid_BT, first_B, end)
    first = first_pass(split, shortened(inputs, valid_BT.shape, prompt))
    return second_pass(
        split,
        shortened(inputs, valid_BT.shape, end),
        extended(first.pairs, end),
        at_BK,
        live_BK,
    )


def _from_first_on(valid_BT: Tensor, first_B: Tensor, end: int) -> tuple[Tensor, Tensor]:
    """Each row's positions from its first valid one to its last; spare slots repeat the last."""
    length = valid_BT.shape[1]
    last_B = length - 1 - valid_BT.flip(1).int().argmax(1)
    none_B = first_B == length
    first_B, last_B = first_B.masked_fill(none_B, 0), last_B.masked_fill(none_B, 0)
    widest = int((last_B - first_B).max()) + 1
    at_BK = first_B[:, None] + torch.arange(widest, device=valid_BT.device)
    live_BK = (at_BK <= last_B[:, None]) & ~none_B[:, None]
    return at_BK.minimum(last_B[:, None]), live_BK


def shortened(inputs: dict[str, Any], shape: tuple[int, ...], length: int) -> dict[str, Any]:
    """The inputs of the first `length` positions."""
    return {name: _truncate(value, tuple(shape), length) for name, value in inputs.items()}


def _truncate(value: Any, shape: tuple[int, ...], length: int) -> Any:
    if not isinstance(value, Tensor) or value.dim() < 2:
        return value
    if value.dim() == 4 and value.shape[-2:] == (shape[1], shape[1]):
        return value[..., :length, :length]
    if value.shape[0] in (1, shape[0]) and value.shape[1] == shape[1]:
        return value[:, :length]
    if value.dim() == 3 and value.shape[1:] == shape:
        return value[:, :, :length]
    return value
