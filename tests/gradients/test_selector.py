"""The curriculum: all tokens at first, then fewer, moved by confidence, counted by one hand."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pliant.errors import InvalidInput
from pliant.gradients.config import GradientConfig
from pliant.gradients.selector import Schedule, version_of


def at(steps: int, **settings: Any) -> Schedule:
    schedule = Schedule(GradientConfig(**settings))
    for _ in range(steps):
        schedule.step()
    return schedule


def test_the_warm_up_by_hand() -> None:
    ratios = [at(n, ratio=0.25, warmup_steps=4).ratio() for n in range(6)]
    assert ratios == [1.0, 0.8125, 0.625, 0.4375, 0.25, 0.25]
    assert at(0, ratio=0.25).ratio() == 0.25, "without a warm-up there is none"


@given(
    st.floats(0.01, 1),
    st.integers(0, 50),
    st.integers(0, 60),
    st.floats(0, 1),
    st.floats(0, 3),
)
def test_dynamic_moves_both_ways_within_its_limits(
    ratio: float, warmup: int, steps: int, confidence: float, sensitivity: float
) -> None:
    settings = {"ratio": ratio, "warmup_steps": warmup}
    base = at(steps, **settings).ratio()
    moving = at(steps, dynamic=True, sensitivity=sensitivity, **settings)
    found = moving.ratio(confidence)
    assert base / 2 <= found <= 1
    assert (found >= base) if confidence <= 0.5 else (found <= base)
    assert moving.ratio() == base, "nothing is known of the confidence"
    assert at(steps, sensitivity=sensitivity, **settings).ratio(confidence) == base, "not dynamic"


def test_dynamic_by_hand() -> None:
    moving = at(0, ratio=0.4, dynamic=True, sensitivity=0.5)
    found = [moving.ratio(c) for c in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert found == pytest.approx([0.6, 0.5, 0.4, 0.3, 0.2])


def test_the_start_is_exactly_all_whatever_the_confidence() -> None:
    sure = at(0, ratio=0.25, warmup_steps=1000, dynamic=True)
    assert sure.ratio(0.99) == sure.ratio(0.01) == 1.0


def test_a_fixed_quota_is_not_moved() -> None:
    fixed = at(0, ratio=0.4, dynamic=True, selection="fixed_quota")
    assert fixed.ratio(0.0) == fixed.ratio(1.0) == 0.4


def test_dense_steps() -> None:
    first = [at(n, dense_first=2, warmup_steps=2, ratio=0.5).ratio() for n in range(6)]
    assert first == [1, 1, 1, 0.75, 0.5, 0.5], "the warm-up begins when they are over"
    every = [at(n, dense_every=3).is_dense() for n in range(7)]
    assert every == [True, False, False, True, False, False, True]
    assert at(3, dense_every=3, dynamic=True).ratio(0.9) == 1.0


def test_forward_passes_are_steps_while_nobody_steps() -> None:
    schedule = Schedule(GradientConfig(warmup_steps=10))
    for _ in range(5):
        schedule.forward_seen()
    assert schedule.steps == 5


def test_parts_of_a_step_have_one_count_of_tokens() -> None:
    schedule = Schedule(GradientConfig(warmup_steps=10))
    for _ in range(3):
        items = torch.tensor(20)  # as many in every step: it is the tensor that tells
        for part in (items, items.view(()), items):
            schedule.begin(part)
    assert schedule.steps == 2 and schedule.state()["steps"] == 3


@pytest.mark.parametrize("items", [None, 20])
def test_a_count_that_says_nothing_makes_each_forward_a_step(items: int | None) -> None:
    schedule = Schedule(GradientConfig(warmup_steps=10))
    for _ in range(4):
        schedule.begin(items, version=7)
    assert schedule.steps == 3


def test_weights_that_changed_end_a_step_whatever_the_counts_say() -> None:
    schedule = Schedule(GradientConfig(warmup_steps=10))
    seen = []
    for version in (5, 5, 5, 9, 9, 13):
        schedule.begin(torch.tensor(3), version)
        seen.append(schedule.steps)
    assert seen == [0, 1, 2, 1, 1, 2], "what was counted before the first change was one step"
    resumed = Schedule(schedule.config)
    resumed.load_state(schedule.state())
    resumed.begin(None, 13)
    assert resumed.steps == 3


def test_by_hand_neither_weights_nor_counts_end_a_step() -> None:
    schedule = Schedule(GradientConfig(warmup_steps=10))
    schedule.begin(None, 1)
    schedule.step()
    for version in (2, 3, 4):
        schedule.begin(torch.tensor(3), version)
    assert schedule.steps == 1 == schedule.state()["steps"]


def test_the_version_is_that_of_what_is_trained() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    before = version_of(model)
    with torch.no_grad():
        model[0].weight.mul_(2)
        assert version_of(model) == before
        model[1].bias.add_(1)
    assert version_of(model) > before


@pytest.mark.parametrize("accumulated", [1, 4])
def test_whoever_steps_counts_alone(accumulated: int) -> None:
    schedule = Schedule(GradientConfig(warmup_steps=10))
    for n in range(1, 4):
        for _ in range(accumulated):
            schedule.forward_seen()
        schedule.step()
        assert schedule.steps == n


@pytest.mark.parametrize("by_hand", [True, False])
def test_it_goes_on_where_it_was(by_hand: bool) -> None:
    schedule = Schedule(GradientConfig(warmup_steps=10))
    advance = Schedule.step if by_hand else Schedule.forward_seen
    for _ in range(3):
        advance(schedule)
    resumed = Schedule(schedule.config)
    resumed.load_state(json.loads(json.dumps(schedule.state())))
    resumed.forward_seen()
    assert resumed.steps == (3 if by_hand else 4)
    resumed.step()
    assert resumed.steps == 4, "the forward belonged to this step"


@pytest.mark.parametrize("state", [{}, {"steps": -1, "by_hand": True}, {"steps": 2, "by_hand": 3}])
def test_a_state_that_is_none_is_refused(state: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match="a schedule's state"):
        Schedule(GradientConfig()).load_state(state)
