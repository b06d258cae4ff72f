"""The loss of recovery equals its definition, gradient and all, however it is cut into parts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pliant.structure.recovery import distillation
from pliant.structure.recovery.distillation import labelled, recovery_loss


def logits(seed: int) -> Tensor:
    return 3 * torch.randn(2, 7, 11, generator=torch.Generator().manual_seed(seed))


LABELS = torch.randint(0, 11, (2, 7), generator=torch.Generator().manual_seed(9))
LABELS[0, :3] = LABELS[1, 5:] = -100


def by_definition(student: Tensor, teacher: Tensor, distill: float, temperature: float) -> Tensor:
    at = LABELS[:, 1:] != -100
    own, theirs = student[:, :-1][at], teacher[:, :-1][at]
    text = F.cross_entropy(own, LABELS[:, 1:][at], reduction="sum")
    divergence = F.kl_div(
        (own / temperature).log_softmax(-1), (theirs / temperature).softmax(-1), reduction="sum"
    )
    return (1 - distill) * text + distill * temperature**2 * divergence


@pytest.mark.parametrize(("distill", "temperature"), [(0.0, 1.0), (1.0, 1.0), (0.3, 2.0)])
@pytest.mark.parametrize("at_once", [1, 44, 2**20])
def test_the_loss_and_its_gradient(
    distill: float, temperature: float, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distillation, "AT_ONCE", at_once)  # a row, four rows, or all at once
    ours, theirs = (logits(0).requires_grad_() for _ in range(2))
    options = {"distill": distill, "temperature": temperature}
    loss = recovery_loss(ours, LABELS, logits(1), **options)
    expected = by_definition(theirs, logits(1), **options)
    torch.testing.assert_close(loss, expected)
    (2 * loss).backward()
    (2 * expected).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_without_a_teacher_it_is_the_model_s_own_loss() -> None:
    loss = recovery_loss(logits(0), LABELS) / labelled(LABELS)
    own = F.cross_entropy(logits(0)[:, :-1].flatten(0, 1), LABELS[:, 1:].flatten())
    torch.testing.assert_close(loss, own)


def test_a_student_that_predicts_as_the_teacher_has_nothing_to_learn() -> None:
    student = logits(0).requires_grad_()
    loss = recovery_loss(student, LABELS, logits(0), distill=1.0)
    loss.backward()
    assert abs(float(loss.detach())) < 1e-5
    assert student.grad is not None and float(student.grad.abs().max()) < 1e-6


def test_the_gradient_has_the_dtype_of_the_logits() -> None:
    student = logits(0).bfloat16().requires_grad_()
    recovery_loss(student, LABELS, logits(1).bfloat16(), distill=0.5).backward()
    assert student.grad is not None and student.grad.dtype == torch.bfloat16
