"""Scores stand between two visits that refresh them, whatever the padding, in bounded memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pliant.errors import InvalidInput
from pliant.gradients.choosing.stale import StaleScores

IDS = torch.tensor([7, 9])
VALID = torch.tensor([[True, True, False], [False, True, False]])
SCORES = torch.tensor([[1.0, 2.0, 9.0], [9.0, 3.0, 9.0]])
AS_KEPT = [[1.0, 2.0, 0.0], [0.0, 3.0, 0.0]]


@pytest.mark.parametrize("refresh", [1, 2, 3])
def test_an_example_is_scored_every_refresh_visits(refresh: int) -> None:
    stale, due = StaleScores(refresh), []
    for _ in range(7):
        found = stale.recall(IDS, VALID)
        due.append(bool(found.due_B.all()))
        if due[-1]:
            assert not found.difficulty_BT.any()
            stale.keep(IDS, SCORES, VALID, found.due_B)
        else:
            assert found.difficulty_BT.tolist() == AS_KEPT
    assert due == [visit % refresh == 0 for visit in range(7)]


def test_padding_plays_no_part() -> None:
    stale = StaleScores(5)
    stale.keep(IDS, SCORES, VALID, torch.tensor([True, True]))
    moved = torch.tensor([[False, False, True, False, True], [False, True, False, False, False]])
    found = stale.recall(IDS, moved)
    assert found.difficulty_BT.tolist() == [[0, 0, 1, 0, 2], [0, 3, 0, 0, 0]]
    cut = stale.recall(IDS, torch.tensor([[True], [True]]))
    assert cut.due_B.tolist() == [True, False], "7 comes with another number of labels"


def test_only_rows_that_were_due_are_kept() -> None:
    stale = StaleScores(5)
    stale.keep(IDS, SCORES, VALID, torch.tensor([False, True]))
    assert stale.recall(IDS, VALID).due_B.tolist() == [True, False]


@given(st.lists(st.integers(0, 8), max_size=40), st.integers(1, 12))
def test_memory_is_bounded_and_the_oldest_goes(ids: list[int], room: int) -> None:
    stale, valid = StaleScores(100, room), torch.ones(1, 3, dtype=torch.bool)
    for example in ids:
        one = torch.tensor([example])
        stale.keep(one, torch.rand(1, 3), valid, torch.tensor([True]))
        assert stale.tokens <= room and stale.tokens == 3 * len(stale)
    newest = list(dict.fromkeys(reversed(ids)))[: room // 3]
    assert len(stale) == len(newest)
    for example in newest:
        assert not stale.recall(torch.tensor([example]), valid).due_B.item()


def test_it_goes_on_where_it_was() -> None:
    stale = StaleScores(3)
    stale.keep(IDS, SCORES, VALID, torch.tensor([True, True]))
    stale.recall(IDS, VALID)
    other = StaleScores(3)
    other.take(stale.state())
    assert other.recall(IDS, VALID).difficulty_BT.tolist() == AS_KEPT
    assert other.recall(IDS, VALID).due_B.all(), "two of the three visits were before it was saved"
    empty = StaleScores(3)
    empty.take(StaleScores(3).state())
    assert len(empty) == 0


def test_what_is_no_number_is_kept_as_one() -> None:
    stale, valid = StaleScores(2), torch.ones(1, 3, dtype=torch.bool)
    odd = torch.tensor([[float("nan"), float("inf"), -1e30]])
    stale.keep(torch.tensor([1]), odd, valid, torch.tensor([True]))
    assert stale.recall(torch.tensor([1]), valid).difficulty_BT.tolist() == [[0, 65504, -65504]]


def test_bad_input_is_named() -> None:
    with pytest.raises(InvalidInput, match=r"one whole number for each of the 2 rows"):
        StaleScores(2).recall(torch.tensor([1.0, 2.0]), VALID)
    with pytest.raises(InvalidInput, match=r"shape \(3,\)"):
        StaleScores(2).recall(torch.tensor([1, 2, 3]), VALID)
    with pytest.raises(InvalidInput, match="refresh = 0"):
        StaleScores(0)
    broken = StaleScores(2).state() | {"ids": torch.tensor([1])}
    with pytest.raises(InvalidInput, match="no kept scores"):
        StaleScores(2).take(broken)
