"""The losses of a scorer: one number for each prompt.

Shapes: B prompts, L outputs. Left out: the weighted mean of torch's `cross_entropy`, which divides
by the weights in the batch. Here a prompt's loss does not depend on its batch, so batches of any
size and gradient accumulation add up to the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pliant.complexity.config import GAIN, Reads
from pliant.complexity.training.config import CPXTrainingConfig, Loss
from pliant.errors import InvalidInput

READ_AS: dict[str, Reads] = {"bce": "probabilities", "ce": "classes", "regression": "numbers"}
"""How outputs are read that a loss has trained."""


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
    regression: squared error. Without `loss`, integers of shape (B,) and several outputs mean ce,
    anything else bce.

    `class_weights` weighs the positives of each output (bce) or each class (ce); `label_smoothing`
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


def loss_of(
    logits_BL: Tensor, labels: Tensor, outputs: Sequence[str], config: CPXTrainingConfig
) -> Tensor:
    """The mean loss of a batch. A gain is a difference of probabilities and not a logit: beside
    probabilities it is learned by its squared error."""
    settings: Any = {
        "class_weights": config.class_weights,
        "label_smoothing": config.label_smoothing,
    }
    if config.loss != "bce" or GAIN not in outputs:
        return losses(logits_BL, labels, config.loss, **settings).mean()
    linear = [i for i, name in enumerate(outputs) if name == GAIN]
    others = [i for i in range(len(outputs)) if i not in linear]
    gains = losses(logits_BL[:, linear], labels[:, linear], "regression") * len(linear)
    if not others:
        return gains.mean()
    weights = [config.class_weights[i] for i in others] if config.class_weights else ()
    settings["class_weights"] = weights
    rest = losses(logits_BL[:, others], labels[:, others], "bce", **settings) * len(others)
    return ((gains + rest) / len(outputs)).mean()


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


def check_weights(weights: Sequence[float], outputs: int, loss: Loss) -> None:
    if weights and (loss == "regression" or len(weights) != outputs):
        raise InvalidInput(
            f"class_weights = {tuple(weights)}: give one for each of {outputs} outputs, and none "
            "for a regression"
        )


def _weights(weights: Sequence[float], logits_BL: Tensor, loss: Loss) -> Tensor | None:
    check_weights(weights, logits_BL.shape[1], loss)
    if not weights:
        return None
    return torch.tensor(weights, dtype=logits_BL.dtype, device=logits_BL.device)
