"""Logits and the targets that they predict, from whatever a model returned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pliant.data.collate import IGNORED
from pliant.errors import InvalidInput


def logits_of(outputs: Any) -> Tensor:
    """The logits in a tensor, a ModelOutput, a dict or a tuple (of which a loss may come first)."""
    found = outputs
    if isinstance(outputs, Mapping):
        found = outputs.get("logits")
    elif isinstance(outputs, (tuple, list)):
        found = next((x for x in outputs if isinstance(x, Tensor) and x.dim() >= 2), None)
    elif not isinstance(outputs, Tensor):
        found = getattr(outputs, "logits", None)
    if not isinstance(found, Tensor):
        raise InvalidInput(f"a {type(outputs).__name__} without logits: give a model's output")
    return found


def aligned(outputs: Any, targets: Tensor | None) -> tuple[Tensor, Tensor]:
    """Logits (B, T, V) and the target of each, (B, T).

    A tensor's logits stand beside their targets already, as (B, T, V) and (B, T) or as (N, V) and
    (N,), which is one row. A model's output stands beside its inputs' labels: each position
    predicts the next one's, and the last nothing.
    """
    logits = logits_of(outputs)
    if targets is None:
        raise InvalidInput("there are no targets: criterion(logits, targets) takes them second")
    if logits.dim() not in (2, 3) or targets.shape != logits.shape[:-1]:
        raise InvalidInput(
            f"targets of shape {tuple(targets.shape)} for logits of {tuple(logits.shape)}: "
            "(N,) for (N, V) or (B, T) for (B, T, V) is due"
        )
    if logits.dim() == 2:
        return logits[None], targets[None]
    if isinstance(outputs, Tensor):
        return logits, targets
    return logits, following(targets)


def following(labels_BT: Tensor) -> Tensor:
    """What each position predicts: the label of the next, and nothing at the end."""
    return torch.nn.functional.pad(labels_BT[:, 1:], (0, 1), value=IGNORED)


def mean_where(mask_BT: Tensor, values_BT: Tensor) -> Tensor:
    """The mean of the masked; 0 if there are none."""
    return torch.where(mask_BT, values_BT, 0.0).sum() / mask_BT.sum().clamp(min=1)
