"""The tests of a mean loss: exact by enumeration, and hardly more cautious than they have to be."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from pliant.routing.goals.risk import highest_sums, lowest_share, passes, proves_below, whole


def chance(n: int, share: float, mean: float, highest: np.ndarray) -> float:
    """How often n losses of -1, 0 and 1 pass, by summing over every number of losses and gains."""
    k = np.arange(n + 1)
    of_k = binom.pmf(k, n, share)
    gains = np.arange(n + 1)[:, None]
    possible = (gains <= k) & (k - 2 * gains <= highest)
    return float((of_k * binom.pmf(gains, k, (share - mean) / 2 / share) * possible).sum())


@settings(max_examples=60)
@given(
    st.integers(1, 60),
    st.sampled_from([0.0, 0.01, 0.02, 0.05, 0.3]),
    st.sampled_from([0.01, 0.05, 0.2]),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_no_population_above_the_limit_passes_more_often_than_allowed(
    n: int, limit: float, delta: float, a: float, b: float
) -> None:
    mean = limit + (1 - limit) * a**4  # mostly near the limit, where it is hard
    share = max(mean + (1 - mean) * b**2, 1e-9)
    assert chance(n, share, mean, highest_sums(n, limit, delta)) <= 1.01 * delta


@pytest.mark.parametrize("n", [255, 1275])
@pytest.mark.parametrize("delta", [0.05, 0.2])
def test_the_test_gives_little_of_the_risk_away(n: int, delta: float) -> None:
    highest = highest_sums(n, 0.04, delta)
    for share in (0.06, 0.15, 0.4):
        assert 0.6 * delta < chance(n, share, 0.04, highest) <= delta


@given(st.integers(1, 400), st.floats(0, 0.9), st.floats(1e-6, 0.6))
@settings(max_examples=30)
def test_more_losses_never_prove_more(n: int, limit: float, delta: float) -> None:
    """A loss instead of a 0, or a 0 instead of a gain, turns no failure into a proof."""
    highest = highest_sums(n, limit, delta)
    assert (np.diff(highest) <= 0).all() and (np.diff(highest) >= -1).all()


def test_a_lower_risk_or_limit_never_proves_more() -> None:
    by_delta = [highest_sums(300, 0.03, delta) for delta in (0.01, 0.05, 0.2, 0.4)]
    by_limit = [highest_sums(300, limit, 0.05) for limit in (0.0, 0.02, 0.05, 0.2, 1.0)]
    for tests in (by_delta, by_limit):
        assert all((low <= high).all() for low, high in zip(tests, tests[1:], strict=False))


def test_losses_between_are_rounded_without_changing_the_mean() -> None:
    losses = np.random.default_rng(0).choice([-1.0, -0.25, 0.0, 0.5, 1.0], 400)
    rounded = np.array([whole(losses, seed) for seed in range(500)])
    assert set(np.unique(rounded)) == {-1, 0, 1}
    assert np.abs(rounded.mean(axis=0) - losses).max() < 0.1
    assert (whole(np.sign(losses)) == np.sign(losses)).all()


def test_rounded_losses_keep_the_level() -> None:
    rng, passed = np.random.default_rng(1), 0
    for _ in range(2000):  # four samples of two models: the mean loss is .02
        strong, weak = rng.binomial(4, 0.5, 200) / 4, rng.binomial(4, 0.48, 200) / 4
        passed += proves_below(strong - weak, 0.02, 0.1)
    assert passed <= 200 + 3.1 * math.sqrt(2000 * 0.09)


@given(st.integers(1, 80), st.floats(0.01, 0.99), st.sampled_from([0.005, 0.02, 0.2]))
@settings(max_examples=60)
def test_a_share_is_below_its_lower_bound_as_rarely_as_stated(
    n: int, share: float, delta: float
) -> None:
    right = [np.repeat([1.0, 0.0], [count, n - count]) for count in range(n + 1)]
    bounds = np.array([lowest_share(each, delta) for each in right])
    assert binom.pmf(np.arange(n + 1), n, share)[bounds > share].sum() <= delta + 1e-9


def test_small_samples_and_certain_losses_prove_nothing() -> None:
    assert not proves_below(np.zeros(20), 0.02, 0.05)
    assert not proves_below(np.zeros(140), 0.02, 0.05)  # .98 ** 140 is .059
    assert proves_below(np.zeros(2000), 0.02, 0.05)
    assert not proves_below(np.ones(2000), 0.02, 0.05)
    assert not proves_below(np.tile([1.0, 0.0], 500), 0.5, 0.05)
    assert proves_below(np.full(500, -0.5), 0.0, 0.05)
    assert proves_below(np.ones(3), 1.0, 0.05)
    assert passes(np.zeros(3), highest_sums(3, 1.0, 0.05))
