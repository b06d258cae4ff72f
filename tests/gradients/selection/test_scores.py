"""The scores are their formulas, by hand, and no more of the vocabulary exists than asked for."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pliant.errors import InvalidInput
from pliant.gradients.config import Score
from pliant.gradients.selection.scores import difficulty, in_chunks

SCORES = get_args(Score)
P = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]])  # two rows, a vocabulary of three
Y = torch.tensor([1, 1])
H0 = 0.5 * math.log(2) + 0.5 * math.log(4)
H1 = -0.8 * math.log(0.8) - 0.2 * math.log(0.1)
BY_HAND = {
    "entropy": [H0 - 0.5, H1 - 0.8],
    "margin": [1 - 0.25, 1 - 0.7],
    "loss": [math.log(4), -math.log(0.8)],
    "combined": [H0 - 0.5 + 0.75 + math.log(4), H1 - 0.8 + 0.3 - math.log(0.8)],
    "gradient": [math.sqrt(0.25 + 0.5625 + 0.0625), math.sqrt(0.01 + 0.04 + 0.01)],
    "doubt": [math.log(4) * H0 / math.log(3), -math.log(0.8) * H1 / math.log(3)],
}
WITHOUT_TARGETS = {
    "entropy": [H0 - 0.5, H1 - 0.8],
    "margin": [0.75, 0.3],
    "loss": [H0, H1],
    "combined": [2 * H0 + 0.25, 2 * H1 - 0.5],
    "gradient": [math.sqrt(1 - 0.375), math.sqrt(1 - 0.66)],
    "doubt": [H0 * H0 / math.log(3), H1 * H1 / math.log(3)],
}


def test_every_score_is_written_down_here() -> None:
    assert set(SCORES) == set(BY_HAND) == set(WITHOUT_TARGETS)
    different = {tuple(round(x, 6) for x in values) for values in BY_HAND.values()}
    assert len(different) == len(SCORES)


@pytest.mark.parametrize("score", SCORES)
def test_by_hand(score: Score) -> None:
    found = difficulty(P.log() + 7, Y, score)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor(BY_HAND[score]))


@pytest.mark.parametrize("score", SCORES)
def test_without_targets_a_score_is_what_the_model_expects(score: Score) -> None:
    torch.testing.assert_close(
        difficulty(P.log(), None, score), torch.tensor(WITHOUT_TARGETS[score])
    )


def test_gradient_is_the_length_of_autograds() -> None:
    logits = (3 * torch.randn(50, 17)).requires_grad_()
    targets = torch.randint(17, (50,))
    torch.nn.functional.cross_entropy(logits, targets, reduction="sum").backward()
    assert logits.grad is not None
    torch.testing.assert_close(difficulty(logits, targets, "gradient"), logits.grad.norm(dim=-1))


def test_gradient_keeps_its_digits_where_the_model_is_sure() -> None:
    """sqrt(1 - 2 p + sum p^2) in fp32 is 0 or 3e-4 here; the truth is 1.4e-5."""
    logits = torch.tensor([[0.0, 11.5, -40.0]])
    p = logits.double().softmax(-1)
    true = (p - torch.tensor([[0.0, 1.0, 0.0]])).norm(dim=-1)
    found = difficulty(logits, torch.tensor([1]), "gradient")
    torch.testing.assert_close(found.double(), true, rtol=1e-2, atol=0)


def test_doubt_lets_a_confident_conflict_count_little() -> None:
    sure_and_wrong, unsure = torch.tensor([[12.0, 0, 0, 0]]), torch.zeros(1, 4)
    target = torch.tensor([1])
    losses = [difficulty(x, target, "loss").item() for x in (sure_and_wrong, unsure)]
    doubts = [difficulty(x, target, "doubt").item() for x in (sure_and_wrong, unsure)]
    assert losses[0] > 8 * losses[1] and doubts[0] < doubts[1] / 100


@pytest.mark.parametrize("score", SCORES)
def test_a_target_that_is_none_has_no_loss(score: Score) -> None:
    found = difficulty(P.log(), torch.tensor([-100, 1]), score)
    rest = {"entropy": BY_HAND["entropy"][0], "margin": 0.75, "combined": H0 - 0.5 + 0.75}
    torch.testing.assert_close(found, torch.tensor([rest.get(score, 0.0), BY_HAND[score][1]]))


@pytest.mark.parametrize("score", SCORES)
def test_masked_vocabulary_is_no_nan(score: Score) -> None:
    logits = torch.tensor([[1.0, 2.0, -torch.inf]])
    without = difficulty(logits[:, :2], torch.tensor([0]), score)
    if score == "doubt":
        without = without * math.log(2) / math.log(3)
    torch.testing.assert_close(difficulty(logits, torch.tensor([0]), score), without)


@given(
    st.integers(0, 40),
    st.integers(1, 9),
    st.integers(1, 50),
    st.sampled_from(SCORES),
    st.booleans(),
)
def test_chunks_change_nothing(
    n: int, vocabulary: int, rows: int, score: Score, known: bool
) -> None:
    hidden, head = torch.randn(n, 4), torch.randn(4, vocabulary)
    targets = torch.randint(-1, vocabulary, (n,)) if known else None
    whole = difficulty(hidden @ head, targets, score)
    largest = 0

    def logits_of(hidden_ND: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, len(hidden_ND))
        return hidden_ND @ head

    scored = in_chunks(logits_of, hidden, targets, score, rows=rows, confidence=True)
    found, confidence = scored.scores_N, scored.confidence
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-5)
    assert largest <= rows and found.isfinite().all()
    top = (hidden @ head).softmax(-1).amax(-1)
    counted = top if targets is None else top[targets >= 0]
    expected = counted.mean() if len(counted) else torch.zeros(())
    torch.testing.assert_close(confidence, expected)
    again = in_chunks(logits_of, hidden, targets, score, rows=rows)
    torch.testing.assert_close(again.scores_N, found, rtol=1e-4, atol=1e-5)
    losses = difficulty(hidden @ head, targets, "loss")
    torch.testing.assert_close(again.losses_N, losses, rtol=1e-4, atol=1e-5)
    assert again.confidence is None


def test_nothing_is_recorded_for_a_backward_pass() -> None:
    hidden = torch.randn(3, 4, requires_grad=True)
    head = torch.randn(4, 5, requires_grad=True)
    assert not in_chunks(lambda h: h @ head, hidden, None, "loss").scores_N.requires_grad
    assert not difficulty(hidden, None, "entropy").requires_grad


def test_half_precision_is_scored_in_full() -> None:
    logits = torch.randn(6, 1000, dtype=torch.bfloat16)
    targets = torch.randint(1000, (6,))
    for score in SCORES:
        assert torch.equal(
            difficulty(logits, targets, score), difficulty(logits.float(), targets, score)
        )


def test_bad_input_is_named() -> None:
    with pytest.raises(InvalidInput, match=r"\(2, 3, 4\)"):
        difficulty(torch.zeros(2, 3, 4), None, "loss")
    with pytest.raises(InvalidInput, match="rows = 0"):
        in_chunks(lambda h: h, torch.zeros(2, 3), None, "loss", rows=0)
