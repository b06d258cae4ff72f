"""How far a scorer's outputs are from the labels: one number for each prompt.

Shapes: B prompts, L outputs. Left out: torch's weighted mean of `cross_entropy`, which divides by
the weights in the batch. Here each prompt's loss is its own, whatever batch it is in, so that
batches of any size and gradient accumulation add up to the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from pliant.complexity.config import Reads
from pliant.errors import InvalidInput

Loss = Literal["bce", "ce", "regression"]
READ_AS: dict[str, Reads] = {"bce": "probabilities", "ce": "classes", "regression": "numbers"}
"""What outputs are that were learned by a loss."""


def losses(
    logits_BL: Tensor,
    labels: Tensor,
    loss: Loss | None = None,
    *,
    class_weights: Sequence[float] = (),
    label_smoothing: float = 0.0,
) -> Tensor:
    """Each prompt's loss, (B,).

    bce: each output is a probability of its own; labels are 0, 1 or soft, of shape (B, L) or, for
    one output, (B,). ce: one class of several; labels are classes (B,) or shares (B, L).
    regression: squared error. Left out, it is ce for integers of shape (B,) and several outputs,
    else bce.

    `class_weights` weigh the positives of each output (bce) or each class (ce); `label_smoothing`
    spreads that share of each label evenly over the answers.
    """
    if loss is None:
        classes = labels.dim() == 1 and not labels.is_floating_point() and logits_BL.shape[1] > 1
        loss = "ce" if classes else "bce"
    logits_BL = logits_BL.float()
    weights = _weights(class_weights, logits_BL, loss)
    if loss == "ce":
        return _ce(logits_BL, _shares(logits_BL, labels), weights, label_smoothing)
    targets_BL = _like(logits_BL, labels)
    if loss == "regression":
        return F.mse_loss(logits_BL, targets_BL, reduction="none").mean(dim=1)
    targets_BL = targets_BL * (1 - label_smoothing) + label_smoothing / 2
    each_BL = F.binary_cross_entropy_with_logits(
        logits_BL, targets_BL, pos_weight=weights, reduction="none"
    )
    return each_BL.mean(dim=1)


def _ce(logits_BL: Tensor, shares_BL: Tensor, weights: Tensor | None, smoothing: float) -> Tensor:
    shares_BL = shares_BL * (1 - smoothing) + smoothing / logits_BL.shape[1]
    if weights is not None:
        shares_BL = shares_BL * weights
    return -(shares_BL * logits_BL.log_softmax(dim=1)).sum(dim=1)


def _shares(logits_BL: Tensor, labels: Tensor) -> Tensor:
    batch, classes = logits_BL.shape
    if labels.dim() == 2 and labels.shape[1] == classes:
        return _like(logits_BL, labels)
    numbers = labels.reshape(-1)
    if len(numbers) != batch or numbers.is_floating_point():
        raise InvalidInput(
            f"ce takes {batch} whole numbers below {classes}, or shares of shape "
            f"({batch}, {classes}); the labels are {labels.dtype} of shape {tuple(labels.shape)}"
        )
    if len(numbers) and not 0 <= int(numbers.min()) <= int(numbers.max()) < classes:
        raise InvalidInput(f"a label is not a class from 0 to {classes - 1}")
    return F.one_hot(numbers.to(logits_BL.device), classes).to(logits_BL.dtype)


def _like(logits_BL: Tensor, labels: Tensor) -> Tensor:
    if labels.numel() != logits_BL.numel() or len(labels) != len(logits_BL):
        raise InvalidInput(
            f"labels of shape {tuple(labels.shape)} for outputs of shape {tuple(logits_BL.shape)}: "
            "give one number for each output of each prompt"
        )
    return labels.to(logits_BL).reshape(logits_BL.shape)


def _weights(given: Sequence[float], logits_BL: Tensor, loss: Loss) -> Tensor | None:
    if not given:
        return None
    if loss == "regression" or len(given) != logits_BL.shape[1]:
        raise InvalidInput(
            f"class_weights = {tuple(given)}: give one for each of {logits_BL.shape[1]} outputs, "
            "and none for a regression"
        )
    return torch.tensor(given, dtype=logits_BL.dtype, device=logits_BL.device)
