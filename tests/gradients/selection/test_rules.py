"""What each rule chooses, how many, and with which weights."""

from __future__ import annotations

from fractions import Fraction
from math import ceil
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pliant.errors import InvalidInput
from pliant.gradients.config import GradientConfig, Selection
from pliant.gradients.selection.rules import Chosen, choose, quota

RULES = get_args(Selection)
UNBIASED = ("sampled", "uniform")
RATIOS = st.integers(1, 100).map(lambda percent: percent / 100)
ODD = [0.0, -1.0, 3.4e38, float("inf"), float("-inf"), float("nan")]


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Scores and validity: ragged rows, empty rows, ties, and what is no number."""
    b, t = draw(st.integers(1, 4)), draw(st.integers(1, 20))
    score = st.one_of(st.floats(0, 10, width=32), st.sampled_from(ODD), st.just(1.0))
    scores = torch.tensor(draw(st.lists(score, min_size=b * t, max_size=b * t)))
    valid = torch.tensor(draw(st.lists(st.booleans(), min_size=b * t, max_size=b * t)))
    return scores.view(b, t), valid.view(b, t)


def sets(chosen: Chosen) -> list[list[int]]:
    return [p[live].tolist() for p, live in zip(chosen.positions_BK, chosen.live_BK, strict=True)]


@given(batches(), st.sampled_from(RULES), RATIOS, st.integers(1, 5))
def test_every_rule(batch: tuple[Tensor, Tensor], rule: Selection, ratio: float, few: int) -> None:
    scores_BT, valid_BT = batch
    config = GradientConfig(selection=rule, num_strata=few, min_tokens_per_sequence=few)
    chosen = choose(scores_BT, valid_BT, config, ratio, torch.Generator().manual_seed(few))
    positions_BK, weights_BK, live_BK = chosen.positions_BK, chosen.weights_BK, chosen.live_BK
    assert positions_BK.dtype == torch.long and weights_BK.dtype == torch.float32
    assert (positions_BK.diff(dim=-1) >= 0).all(), "ascending"
    assert positions_BK.shape[1] == max(1, int(live_BK.sum(-1).max())), "no wider than need be"
    assert not weights_BK[~live_BK].any() and (weights_BK[live_BK] >= 1 - 1e-6).all()
    count_B = valid_BT.sum(-1).tolist()
    for row, count, valid_T in zip(sets(chosen), count_B, valid_BT, strict=True):
        assert len(set(row)) == len(row) and valid_T[row].all()
        if rule not in ("sequence_aware", "all"):
            assert len(row) == ceil(Fraction(str(ratio)) * count)
        if rule == "sequence_aware":
            assert len(row) >= min(few, count)
    for row, positions_K in zip(sets(chosen), positions_BK, strict=True):
        assert set(positions_K.tolist()) <= set(row or [0]), "empty slots repeat"
    if rule not in UNBIASED and sum(count_B):
        total = weights_BK.sum() / sum(count_B)
        torch.testing.assert_close(total, torch.ones(())), "the mean of the chosen"


@given(batches(), st.sampled_from(RULES))
def test_at_ratio_1_every_rule_keeps_all(batch: tuple[Tensor, Tensor], rule: Selection) -> None:
    scores_BT, valid_BT = batch
    chosen = choose(scores_BT, valid_BT, GradientConfig(selection=rule), 1.0)
    assert sets(chosen) == [row.nonzero()[:, 0].tolist() for row in valid_BT]
    assert (chosen.weights_BK[chosen.live_BK] == 1).all()


@given(batches(), RATIOS, st.floats(0.05, 1))
def test_weights_are_bounded(batch: tuple[Tensor, Tensor], ratio: float, mix: float) -> None:
    """By 1 / (mix * ratio), and of a uniform draw by 1 / ratio: that is, without any clipping."""
    scores_BT, valid_BT = batch
    sampled = choose(scores_BT, valid_BT, GradientConfig(mix=mix), ratio)
    assert sampled.weights_BK.max() <= (1 / (mix * ratio)) * (1 + 1e-6)
    uniform = choose(None, valid_BT, GradientConfig(selection="uniform"), ratio)
    assert uniform.weights_BK.max() <= (1 / ratio) * (1 + 1e-6)


@pytest.mark.parametrize("rule", UNBIASED)
def test_the_loss_is_that_of_all_tokens_on_average(rule: Selection) -> None:
    """Ragged rows, 4,000 draws at once: within five deviations, which are a few per cent."""
    loss_BT = torch.rand(3, 30) ** 2
    valid_BT = torch.rand(3, 30) < torch.tensor([[1.0], [0.5], [0.1]])
    draws = 4_000
    chosen = choose(
        loss_BT.repeat(draws, 1), valid_BT.repeat(draws, 1), GradientConfig(selection=rule), 0.25
    )
    at_chosen = loss_BT.repeat(draws, 1).gather(1, chosen.positions_BK)
    found = (chosen.weights_BK * at_chosen).view(draws, -1).sum(-1)
    true, error = loss_BT[valid_BT].sum(), found.std() / draws**0.5
    assert (found.mean() - true).abs() < 5 * error and error < 0.01 * true


def test_harder_tokens_are_sampled_more_often() -> None:
    loss_BT = torch.tensor([[0.1, 0.1, 0.1, 2.0] * 4]).repeat(2_000, 1)
    config = GradientConfig(selection="sampled", mix=0.5)
    chosen = choose(loss_BT, torch.ones_like(loss_BT, dtype=torch.bool), config, 0.25)
    hard = (chosen.positions_BK % 4 == 3).float().mean()
    # Of 4: each hard one at 4 * (.5 * 2 / 9.2 + .5 / 16) = .56, there are four.
    assert abs(hard - (0.5 * 8 / 9.2 + 0.5 / 4)) < 0.02


def test_topk_takes_the_hardest() -> None:
    scores = torch.tensor([[1.0, 5.0, 3.0, 4.0], [9.0, 0.0, 8.0, 7.0]])
    valid = torch.tensor([[True, True, True, True], [False, True, True, True]])
    for rule in ("topk", "fixed_quota"):
        chosen = choose(scores, valid, GradientConfig(selection=rule), 0.5)  # type: ignore[arg-type]
        assert sets(chosen) == [[1, 3], [2, 3]]
        torch.testing.assert_close(chosen.weights_BK, torch.tensor([[2.0, 2.0], [1.5, 1.5]]))


def test_topk_of_what_is_no_number() -> None:
    """Infinite is hardest, no number is easiest, and equal ones go by position."""
    scores = torch.tensor([[float("nan"), 1.0, float("inf"), float("-inf"), 1.0]])
    valid = torch.ones(1, 5, dtype=torch.bool)
    config = GradientConfig(selection="topk")
    assert sets(choose(scores, valid, config, 0.4)) == [[1, 2]]
    assert sets(choose(torch.zeros(1, 5), valid, config, 0.4)) == [[0, 1]]


def test_stratified_draws_from_every_bucket() -> None:
    """40 tokens in 4 buckets, 10 chosen at 4 : 3 : 2 : 1, whoever is in a bucket by chance."""
    scores = torch.randperm(40).float().expand(3_000, -1)
    valid = torch.ones(3_000, 40, dtype=torch.bool)
    chosen = choose(scores, valid, GradientConfig(selection="stratified"), 0.25)
    drawn = scores.gather(1, chosen.positions_BK)
    for bucket, share in enumerate((1, 2, 3, 4)):
        inside = (drawn >= 10 * bucket) & (drawn < 10 * bucket + 10)
        assert (inside.sum(-1) == share).all()
    often = torch.bincount(drawn.flatten().long(), minlength=40) / 3_000
    expected = torch.tensor([0.1, 0.2, 0.3, 0.4]).repeat_interleave(10)
    assert (often - expected).abs().max() < 0.05, "within a bucket all are alike"


def test_sequence_aware_gives_each_row_its_least_and_the_hardest_the_rest() -> None:
    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 30.0, 40.0]])
    valid = torch.ones(2, 4, dtype=torch.bool)
    config = GradientConfig(selection="sequence_aware", min_tokens_per_sequence=1)
    chosen = choose(scores, valid, config, 0.5)
    assert sets(chosen) == [[3], [1, 2, 3]]
    assert chosen.weights_BK.tolist() == [[2, 0, 0], [2, 2, 2]]
    none_due = GradientConfig(selection="sequence_aware", min_tokens_per_sequence=0)
    assert sets(choose(scores, valid, none_due, 0.5)) == [[], [0, 1, 2, 3]]
    many_due = GradientConfig(selection="sequence_aware", min_tokens_per_sequence=3)
    assert sets(choose(scores, valid, many_due, 0.5)) == [[1, 2, 3], [1, 2, 3]]


@pytest.mark.parametrize("rule", RULES)
def test_rows_without_labels(rule: Selection) -> None:
    config = GradientConfig(selection=rule)
    nothing = choose(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool), config, 0.5)
    assert nothing.positions_BK.tolist() == [[0], [0]]
    assert not nothing.live_BK.any() and not nothing.weights_BK.any()
    assert choose(torch.zeros(0, 3), torch.zeros(0, 3).bool(), config, 0.5).live_BK.numel() == 0


def test_draws_are_the_generators() -> None:
    """The same seed draws the same tokens, another does not, and torch's own stream is left."""
    scores, valid = torch.rand(4, 50), torch.ones(4, 50, dtype=torch.bool)
    before = torch.get_rng_state()

    def drawn(seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return sets(choose(scores, valid, GradientConfig(), 0.2, generator))

    assert drawn(0) == drawn(0) != drawn(1)
    assert torch.equal(torch.get_rng_state(), before)


@given(st.integers(0, 5_000), st.integers(1, 1000))
def test_a_quota_is_what_it_is_in_fractions(count: int, permille: int) -> None:
    found = int(quota(torch.tensor(count), permille / 1000))
    assert found == ceil(Fraction(permille, 1000) * count)


def test_bad_input_is_named() -> None:
    valid = torch.ones(1, 4, dtype=torch.bool)
    with pytest.raises(InvalidInput, match="ratio = 0"):
        choose(None, valid, GradientConfig(), 0)
    with pytest.raises(InvalidInput, match="'sampled' needs scores"):
        choose(None, valid, GradientConfig(), 0.5)
    with pytest.raises(InvalidInput, match=r"\(1, 3\) for positions of \(1, 4\)"):
        choose(torch.zeros(1, 3), valid, GradientConfig(), 0.5)
