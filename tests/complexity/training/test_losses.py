"""The losses are torch's own where torch has them, and one prompt's loss is its own."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from pliant.complexity.training.losses import losses
from pliant.errors import InvalidInput


def logits(outputs: int) -> torch.Tensor:
    return torch.randn(6, outputs, generator=torch.Generator().manual_seed(1))


def test_one_output_is_a_probability() -> None:
    x, y = logits(1), torch.tensor([0, 1, 1, 0, 1, 0])
    torch.testing.assert_close(
        losses(x, y).mean(), F.binary_cross_entropy_with_logits(x[:, 0], y.float())
    )
    assert torch.equal(losses(x, y), losses(x, y.unsqueeze(1)))
    soft = torch.rand(6)
    torch.testing.assert_close(
        losses(x, soft, class_weights=[3.0]).mean(),
        F.binary_cross_entropy_with_logits(x[:, 0], soft, pos_weight=torch.tensor(3.0)),
    )


def test_several_outputs_are_classes_or_probabilities() -> None:
    x, classes = logits(3), torch.tensor([0, 2, 1, 1, 0, 2])
    torch.testing.assert_close(
        losses(x, classes, label_smoothing=0.1).mean(),
        F.cross_entropy(x, classes, label_smoothing=0.1),
    )
    shares = torch.rand(6, 3).softmax(1)
    torch.testing.assert_close(
        losses(x, shares, "ce", class_weights=[1.0, 2.0, 0.5]).mean(),
        F.cross_entropy(x, shares, weight=torch.tensor([1.0, 2.0, 0.5])),
    )
    torch.testing.assert_close(
        losses(x, shares).mean(), F.binary_cross_entropy_with_logits(x, shares)
    )
    torch.testing.assert_close(losses(x, shares, "regression").mean(), F.mse_loss(x, shares))


def test_smoothing_spreads_a_label_over_both_answers() -> None:
    x = logits(1)
    smoothed = losses(x, torch.ones(6), label_smoothing=0.2)
    torch.testing.assert_close(smoothed, losses(x, torch.full((6,), 0.9)))


def test_a_prompt_s_loss_is_its_own() -> None:
    x, y = logits(3), torch.tensor([0, 2, 1, 1, 0, 2])
    options = {"class_weights": (1.0, 5.0, 2.0), "label_smoothing": 0.1}
    whole = losses(x, y, "ce", **options)
    parts = torch.cat(
        [losses(x[:2], y[:2], "ce", **options), losses(x[2:], y[2:], "ce", **options)]
    )
    torch.testing.assert_close(whole, parts)


def test_labels_that_do_not_fit_are_refused() -> None:
    for x, y, options in (
        (logits(1), torch.zeros(5), {}),
        (logits(2), torch.zeros(6), {}),
        (logits(2), torch.full((6,), 2), {"loss": "ce"}),
        (logits(2), torch.full((6,), -1), {"loss": "ce"}),
        (logits(2), torch.zeros(6), {"loss": "ce"}),
        (logits(2), torch.zeros(6, 2), {"class_weights": [1.0]}),
        (logits(2), torch.zeros(6, 2), {"loss": "regression", "class_weights": [1.0, 1.0]}),
    ):
        with pytest.raises(InvalidInput):
            losses(x, y, **options)  # type: ignore[arg-type]
