"""The tests of losses and gains: exact by enumeration, and hardly more cautious than necessary."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from pliant.routing.goals.risk import Counts, proved, rounded

WORTH = st.sampled_from([1.0, 0.95, 0.5])
LIMIT = st.sampled_from([0.0, 0.01, 0.05, 0.3])


def chance(n: int, losses: float, gains: float, limit: float, worth: float, delta: float) -> float:
    """How often n prompts of a population with these shares of losses and gains are a proof."""
    of_rest = min(1.0, gains / max(1 - losses, 1e-12))
    return sum(
        binom.pmf(lost, n, losses) * binom.pmf(gained, n - lost, of_rest)
        for lost, gained in results(n, losses)
        if proved(Counts(n, lost, gained), limit, worth, delta)
    )


def results(n: int, losses: float) -> Iterator[tuple[int, int]]:
    """The numbers of losses and gains that happen: the sums leave out less than 1e-6."""
    most = int(binom.isf(1e-7, n, losses)) + 1
    return ((lost, gained) for lost in range(min(n, most) + 1) for gained in range(n - lost + 1))


@settings(max_examples=40)
@given(
    st.integers(1, 30), LIMIT, WORTH, st.sampled_from([0.05, 0.2]), st.floats(0, 1), st.floats(0, 1)
)
def test_no_population_beyond_the_limit_is_proved_more_often_than_allowed(
    n: int, limit: float, worth: float, delta: float, a: float, b: float
) -> None:
    beyond = limit + (1 - limit) * a**4  # mostly near the limit, where it is hard
    gains = (1 - beyond) / (1 + worth) * b**2
    assert chance(n, beyond + worth * gains, gains, limit, worth, delta) <= 1.001 * delta


@pytest.mark.parametrize("delta", [0.05, 0.2])
def test_the_test_gives_little_of_the_risk_away(delta: float) -> None:
    rng, n = np.random.default_rng(0), 400
    for limit, worth, gains in ((0.04, 1.0, 0.02), (0.04, 1.0, 0.1), (0.1, 0.9, 0.05)):
        losses = limit + worth * gains
        draws = rng.multinomial(n, [losses, gains, 1 - losses - gains], 3000)[:, :2].tolist()
        passed = np.mean([proved(Counts(n, *of), limit, worth, delta) for of in draws])
        assert 0.7 * delta < passed < delta + 3.1 * math.sqrt(delta * (1 - delta) / 3000)


@settings(max_examples=60)
@given(st.integers(1, 400), st.floats(0, 0.9), WORTH, st.floats(0, 0.3), st.floats(0, 0.3))
def test_more_losses_lower_risks_and_lower_limits_never_prove_more(
    n: int, limit: float, worth: float, a: float, b: float
) -> None:
    losses, gains = int(a * n), int(b * n)
    if proved(Counts(n, losses + 1, gains), limit, worth, 0.05):
        assert proved(Counts(n, losses, gains), limit, worth, 0.05)
    for risk, most in ((0.1, limit), (0.05, limit + 0.05)):
        if proved(Counts(n, losses, gains), limit, worth, 0.05):
            assert proved(Counts(n, losses, gains), most, worth, risk)


def test_where_nothing_differs_the_number_of_prompts_decides() -> None:
    assert not proved(Counts(148, 0, 0), 0.02, 1.0, 0.05)  # .98 ** 148 is .0503
    assert proved(Counts(149, 0, 0), 0.02, 1.0, 0.05)  # and .98 ** 149 is .0493
    assert not proved(Counts(0, 0, 0), 0.5, 1.0, 0.2)
    assert proved(Counts(3, 3, 0), 1.0, 0.0, 0.05)  # no share is above 1
    assert not proved(Counts(2000, 2000, 0), 0.02, 1.0, 0.05)
    assert proved(Counts(500, 0, 250), 0.0, 1.0, 0.05)
    assert not proved(Counts(500, 250, 250), 0.0, 1.0, 0.2)


def test_prompts_on_which_no_model_is_right_do_not_count_for_a_quality() -> None:
    strong, routed = np.array([[1, 1, 0, 0, 1], [1, 0, 1, 0, 0]], dtype=bool)
    assert Counts.of(strong, routed) == Counts(5, 2, 1)
    assert Counts.of(strong, routed, either=True) == Counts(4, 2, 1)


def test_grades_between_are_rounded_without_changing_the_mean() -> None:
    right = np.random.default_rng(0).choice([0.0, 0.25, 0.5, 1.0], 400)
    drawn = np.array([rounded(right, seed) for seed in range(500)])
    assert np.abs(drawn.mean(axis=0) - right).max() < 0.1
    whole = np.round(right)
    assert (rounded(whole) == (whole > 0)).all()
    assert (rounded(right) <= rounded(np.minimum(1, right + 0.2))).all()


def test_rounded_grades_keep_the_level() -> None:
    rng, passed = np.random.default_rng(1), 0
    for _ in range(2000):  # four samples of two models: .02 are lost
        strong, weak = rng.binomial(4, 0.5, 200) / 4, rng.binomial(4, 0.48, 200) / 4
        passed += proved(Counts.of(rounded(strong), rounded(weak)), 0.02, 1.0, 0.1)
    assert passed <= 200 + 3.1 * math.sqrt(2000 * 0.09)
