"""The loss of recovery: of the labels, and of the distance from a teacher's predictions.

    loss = recovery_loss(student.logits, labels, teacher.logits, distill=0.5, temperature=1.0)

B sequences of T tokens over a vocabulary of V; N of the positions predict a label. The logits in
fp32 would be the largest tensors of a training step, so the loss is computed over few positions at
a time, together with its derivative with respect to the logits, and only the derivative is stored.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from pliant.data.collate import IGNORED

AT_ONCE = 2**20
"""Logits in fp32 at one time: 4 MB, which a processor's cache can hold."""


def recovery_loss(
    logits_BTV: Tensor,
    labels_BT: Tensor,
    teacher_BTV: Tensor | None = None,
    *,
    distill: float = 0.0,
    temperature: float = 1.0,
) -> Tensor:
    """Summed over the labelled positions: (1 - distill) times the cross entropy, and distill times
    the Kullback-Leibler divergence of the student from the teacher.

    A `temperature` softens both distributions; the divergence is multiplied by its square, so that
    its gradient keeps its size.
    """
    targets_BT = pad(labels_BT[:, 1:], (0, 1), value=IGNORED)
    loss: Tensor = _Loss.apply(
        logits_BTV.flatten(0, 1),
        targets_BT.flatten().to(logits_BTV.device),
        None if teacher_BTV is None else teacher_BTV.flatten(0, 1),
        distill,
        temperature,
    )
    return loss


def labelled(labels_BT: Tensor) -> int:
    """How many positions `recovery_loss` sums over."""
    return int((labels_BT[:, 1:] != IGNORED).sum())


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_RV: Tensor,
        targets_R: Tensor,
        teacher_RV: Tensor | None,
        distill: float,
        temperature: float,
    ) -> Tensor:
        """R = B * T rows, of which those without a label count nothing."""
        gradient_RV = torch.zeros_like(logits_RV)
        total = torch.zeros((), dtype=torch.float64, device=logits_RV.device)
        rows = max(1, AT_ONCE // logits_RV.shape[-1])
        for at_N in (targets_R != IGNORED).nonzero().flatten().split(rows):
            logits_NV = logits_RV[at_N].float()
            own_NV = torch.zeros_like(logits_NV)
            if distill < 1:
                total += (1 - distill) * _cross_entropy(logits_NV, targets_R[at_N], own_NV)
                own_NV *= 1 - distill
            if distill > 0:
                assert teacher_RV is not None
                teacher_NV = teacher_RV[at_N].float()
                total += distill * _divergence(logits_NV, teacher_NV, own_NV, distill, temperature)
            gradient_RV[at_N] = own_NV.to(gradient_RV.dtype)
        ctx.save_for_backward(gradient_RV)
        return total.float()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:
        (gradient_RV,) = ctx.saved_tensors
        return gradient_RV * outer[0].to(gradient_RV.dtype), None, None, None, None


def _cross_entropy(logits_NV: Tensor, targets_N: Tensor, gradient_NV: Tensor) -> Tensor:
    """Its sum; adds its derivative to `gradient_NV`."""
    logs_NV = logits_NV.log_softmax(dim=-1)
    at_N1 = targets_N[:, None]
    loss = -logs_NV.gather(1, at_N1).sum()
    gradient_NV += logs_NV.exp_()
    gradient_NV.scatter_add_(1, at_N1, torch.full_like(at_N1, -1, dtype=gradient_NV.dtype))
    return loss


def _divergence(
    logits_NV: Tensor, teacher_NV: Tensor, gradient_NV: Tensor, weight: float, temperature: float
) -> Tensor:
    """Its sum times the temperature squared; adds `weight` times its derivative."""
    student_NV = (logits_NV / temperature).log_softmax(dim=-1)
    teacher_NV = (teacher_NV / temperature).log_softmax(dim=-1)
    likely_NV = teacher_NV.exp()
    loss = temperature**2 * (likely_NV * (teacher_NV - student_NV)).sum()
    gradient_NV.add_(student_NV.exp_() - likely_NV, alpha=weight * temperature)
    return loss
