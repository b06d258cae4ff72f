"""How the benchmark race measures that one way to train is several times as fast as another."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from benchmarks.gradient_race import settled, times_as_fast
from benchmarks.gradient_ways import DEFAULT
from hypothesis import given
from hypothesis import strategies as st

from pliant.gradients.audit.contenders import STANDARD, Contender
from pliant.gradients.audit.race import step_costs

losses = st.lists(st.floats(0.1, 10), min_size=2, max_size=9)


def curve(values: list[float], every: float = 1.0) -> list[tuple[float, float]]:
    return [(i * every, value) for i, value in enumerate(values)]


@given(losses)
def test_a_curve_is_exactly_as_fast_as_itself(values: list[float]) -> None:
    assert times_as_fast(curve(values), curve(values)) == 1


@given(losses, losses)
def test_one_is_as_many_times_faster_as_the_other_is_slower(a: list[float], b: list[float]) -> None:
    there, back = times_as_fast(curve(a), curve(b)), times_as_fast(curve(b), curve(a))
    assert there * back == pytest.approx(1)


@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=9, unique=True), st.floats(0.1, 10))
def test_the_same_curve_in_less_time_is_faster_by_as_much(
    values: list[float], times: float
) -> None:
    assert times_as_fast(curve(values), curve(values, times)) == pytest.approx(times)


def test_a_dip_that_does_not_last_does_not_count() -> None:
    assert settled(curve([4, 1, 3, 1]), 2) == 2.5
    assert settled(curve([4, 1, 1, 1]), 2) == pytest.approx(2 / 3)


def test_a_slower_curve_is_measured_by_where_it_ends() -> None:
    falls, lags = curve([4, 3, 2, 1]), curve([4, 3.5, 3, 2.5])
    assert times_as_fast(lags, falls) == pytest.approx(1.5 / 3)


def test_a_curve_that_stops_early_and_high_is_not_fast() -> None:
    stops, falls = curve([4, 2, 2, 2]), curve([4, 3, 2, 1])
    assert times_as_fast(stops, falls) == pytest.approx(2 / 3)


def test_a_curve_that_learns_nothing_is_a_thousand_times_slower() -> None:
    assert times_as_fast(curve([4, math.nan]), curve([4, 3])) == pytest.approx(1e-3)
    assert times_as_fast(curve([4, math.inf]), curve([4, math.nan])) == 1


def test_a_loss_that_a_curve_does_not_reach_is_an_error() -> None:
    with pytest.raises(ValueError, match="ends with 3"):
        settled(curve([4, 3]), 2)


def test_a_dense_step_costs_what_standard_trainings_does() -> None:
    ours = Contender("tokens", replace(DEFAULT, dense_first=2, dense_every=4))
    assert step_costs(ours, 0.5, 1.0, 5.0) == [1, 1, 0.5, 0.5, 1, 0.5, 0.5]
    assert step_costs(STANDARD, 1.0, 1.0, 3.0) == [1, 1, 1]
