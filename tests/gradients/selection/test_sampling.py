"""Exactly k a row, with the stated probabilities, and sums that are right on average."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pliant.gradients.selection.rules import inclusion, mixed, starts, systematic

ODD = [0.0, 1.0, 1e-30, 1e30, 3.4e38, -5.0, float("inf"), float("-inf"), float("nan")]
SCORE = st.one_of(st.floats(0, 10, width=32), st.sampled_from(ODD))


@st.composite
def rows(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, validity and a k that each row can give."""
    b, t = draw(st.integers(1, 3)), draw(st.integers(1, 24))
    scores = draw(st.lists(SCORE, min_size=b * t, max_size=b * t))
    valid = draw(st.lists(st.booleans(), min_size=b * t, max_size=b * t))
    valid_BT = torch.tensor(valid).view(b, t)
    k = [draw(st.integers(0, int(n))) for n in valid_BT.sum(-1)]
    return torch.tensor(scores).view(b, t), valid_BT, torch.tensor(k)


def every_draw(share_T: Tensor, valid_T: Tensor, k: int) -> Iterator[tuple[float, Tensor]]:
    """All that systematic sampling can draw, each with its probability.

    What is drawn changes only where a start meets an end on the line, that is at the sums'
    fractions: so the middle of each stretch between two of them stands for all of it.
    """
    ends = torch.cat((share_T.masked_fill(~valid_T, 0).cumsum(0) % 1, torch.tensor([0.0, 1.0])))
    ends = ends.sort().values
    for low, high in zip(ends[:-1], ends[1:], strict=True):
        if high - low > 1e-12:
            start = ((low + high) / 2).view(1)
            drawn = systematic(share_T[None], valid_T[None], torch.tensor([k]), start)
            yield float(high - low), drawn[0]


@given(rows(), st.floats(0.01, 1), st.floats(0, 1, exclude_max=True))
def test_exactly_k_a_row(batch: tuple[Tensor, Tensor, Tensor], mix: float, start: float) -> None:
    scores_BT, valid_BT, k_B = batch
    share_BT = inclusion(mixed(scores_BT, valid_BT, mix), valid_BT, k_B)
    assert share_BT.isfinite().all() and (share_BT >= 0).all() and (share_BT <= 1).all()
    torch.testing.assert_close(share_BT.sum(-1), k_B.double())
    assert not share_BT[~valid_BT].any()
    drawn_BT = systematic(share_BT, valid_BT, k_B, torch.full((len(k_B),), start).double())
    assert torch.equal(drawn_BT.sum(-1), k_B) and not drawn_BT[~valid_BT].any()


@given(rows(), st.floats(0.01, 1))
def test_no_weight_exceeds_its_bound(batch: tuple[Tensor, Tensor, Tensor], mix: float) -> None:
    """1 / probability <= n / (k * mix): with k >= ratio * n, 1 / (mix * ratio)."""
    scores_BT, valid_BT, k_B = batch
    share_BT = inclusion(mixed(scores_BT, valid_BT, mix), valid_BT, k_B)
    least_B1 = (k_B.double() * mix / valid_BT.sum(-1).clamp(min=1)).unsqueeze(-1)
    assert ((share_BT >= least_B1 * (1 - 1e-9)) | ~valid_BT).all()


@given(rows(), st.floats(0.01, 1))
def test_the_weighted_sum_is_right_on_average(
    batch: tuple[Tensor, Tensor, Tensor], mix: float
) -> None:
    """By enumeration: over all starts, the sum of value / probability is the sum of all values."""
    scores_BT, valid_BT, k_B = batch
    share_BT = inclusion(mixed(scores_BT, valid_BT, mix), valid_BT, k_B)
    for share_T, valid_T, k in zip(share_BT, valid_BT, k_B.tolist(), strict=True):
        if k == 0:
            continue
        values_T = torch.randn(len(share_T), dtype=torch.float64)
        mean, seen_T = 0.0, torch.zeros_like(values_T)
        for probability, drawn_T in every_draw(share_T, valid_T, k):
            mean += probability * float((values_T / share_T)[drawn_T].sum())
            seen_T += probability * drawn_T.double()
        torch.testing.assert_close(seen_T, share_T, atol=1e-9, rtol=0)
        assert abs(mean - float(values_T[valid_T].sum())) < 1e-6 / mix


def test_probabilities_by_simulation() -> None:
    """40,000 draws of 5 in 20: each token comes as often as it should, to five deviations."""
    scores_1T = torch.rand(1, 20) ** 4
    valid_1T = torch.ones(1, 20, dtype=torch.bool)
    share_1T = inclusion(mixed(scores_1T, valid_1T, 0.3), valid_1T, torch.tensor([5]))
    draws, generator = 40_000, torch.Generator().manual_seed(1)
    start_N = starts(draws, torch.device("cpu"), generator)
    assert start_N.min() >= 0 and start_N.max() < 1
    drawn_NT = systematic(
        share_1T.expand(draws, -1), valid_1T.expand(draws, -1), torch.full((draws,), 5), start_N
    )
    off_T = (drawn_NT.double().mean(0) - share_1T[0]).abs()
    assert (off_T <= 5 * (share_1T[0] * (1 - share_1T[0]) / draws).sqrt() + 1e-12).all()
    assert share_1T.max() > 3 * share_1T.min(), "so that it is no uniform draw that passes"


def test_probabilities_by_hand() -> None:
    """Sizes 6, 2, 1, 1 and k = 2: the first would get 1.2, so it is certain, and 1 is left for
    4 parts."""
    valid = torch.ones(1, 4, dtype=torch.bool)
    found = inclusion(torch.tensor([[6.0, 2, 1, 1]]), valid, torch.tensor([2]))
    torch.testing.assert_close(found, torch.tensor([[1, 0.5, 0.25, 0.25]]).double())
    again = inclusion(torch.tensor([[60.0, 10, 1, 1]]), valid, torch.tensor([3]))
    torch.testing.assert_close(again, torch.tensor([[1, 1, 0.5, 0.5]]).double())


def test_sizes_by_hand() -> None:
    valid = torch.tensor([[True, True, True, False]])
    found = mixed(torch.tensor([[3.0, 1.0, -2.0, 9.0]]), valid, 0.4)
    expected = [0.6 * 0.75 + 0.4 / 3, 0.6 * 0.25 + 0.4 / 3, 0.4 / 3, 0.0]
    torch.testing.assert_close(found, torch.tensor([expected]).double())
    alike = mixed(torch.zeros(1, 4), valid, 0.4)
    torch.testing.assert_close(alike, torch.tensor([[1 / 3, 1 / 3, 1 / 3, 0]]).double())


def test_long_rows_keep_count() -> None:
    """131,072 tokens of very unlike scores: rounding loses none and draws none twice."""
    scores_1T = torch.rand(1, 131_072) ** 30
    valid_1T = torch.rand(1, 131_072) < 0.9
    k = torch.tensor([30_001])
    share_1T = inclusion(mixed(scores_1T, valid_1T, 0.1), valid_1T, k)
    for start in (0.0, 0.37, 1 - 2**-53):
        drawn_1T = systematic(share_1T, valid_1T, k, torch.tensor([start]).double())
        assert int(drawn_1T.sum()) == 30_001 and not drawn_1T[~valid_1T].any()
