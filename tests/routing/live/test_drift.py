"""Drift: silent while nothing changes, for a router's whole life; loud when something does."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from pliant.errors import InvalidInput
from pliant.routing.live.drift import bound, compare, reference


def life(seed: int, windows: int, shift: float = 0.0, rounded: bool = False) -> list[bool]:
    """Which of a router's windows are called drifted; `shift` moves all scores of the windows."""
    rng = np.random.default_rng(seed)
    draw = lambda n: np.round(rng.beta(2, 3, n), 1 if rounded else 9)  # noqa: E731
    known = reference(draw(1000), window=200, false_alarms=0.05)
    return [
        compare(known, np.clip(draw(200) + shift, 0, 1).tolist(), k).drifted
        for k in range(1, windows + 1)
    ]


@pytest.mark.parametrize("rounded", [False, True])
def test_a_router_that_nothing_happens_to_stays_silent_all_its_life(rounded: bool) -> None:
    """At most 5 in 100 of 400 lives of 30 windows; 400 draws of a twentieth exceed 34 rarely."""
    alarmed = sum(any(life(seed, 30, rounded=rounded)) for seed in range(400))
    assert alarmed <= 34


def test_a_shifted_distribution_is_noticed_in_the_first_window() -> None:
    noticed = sum(life(seed, 1, shift=0.2)[0] for seed in range(100))
    assert noticed >= 95


def test_a_shift_is_noticed_after_a_long_quiet_life_too() -> None:
    rng = np.random.default_rng(0)
    known = reference(rng.beta(2, 3, 1000), window=200)
    late = [
        compare(known, np.clip(rng.beta(2, 3, 200) + 0.3, 0, 1).tolist(), 1000) for _ in range(20)
    ]
    assert all(window.drifted for window in late)


def test_the_distance_is_that_of_kolmogorov_and_smirnov_but_for_what_lies_between_edges() -> None:
    rng = np.random.default_rng(1)
    for shift in (0.0, 0.1, 0.5):
        old, new = rng.normal(0, 1, 640), rng.normal(shift, 1, 300)
        exact = stats.ks_2samp(old, new).statistic
        ours = compare(reference(old), new.tolist(), 1).distance
        assert exact - 1 / 64 - 1e-9 <= ours <= exact + 1e-9


def test_the_shares_of_alpha_sum_to_alpha() -> None:
    known = reference(np.linspace(0, 1, 500), false_alarms=0.02)
    scale = known.n * 200 / (known.n + 200)
    spent = [2 * np.exp(-2 * bound(known, 200, k) ** 2 * scale) for k in range(1, 20_000)]
    assert 0.0199 < sum(spent) <= 0.02


def test_scores_that_come_in_steps_are_told_from_scores_between_the_steps() -> None:
    known = reference([0.2] * 200 + [0.5] * 400)
    assert compare(known, [0.2] * 100 + [0.5] * 200, 1).distance == 0
    for other in (0.1, 0.3, 0.45, 0.6):
        assert compare(known, [0.2] * 100 + [other] * 200, 1).distance == pytest.approx(2 / 3)


def test_scores_that_differ_by_rounding_are_the_same() -> None:
    """As those of a scorer before it was saved, in double precision, and after."""
    known = reference([0.2] * 200 + [0.5] * 400)
    assert compare(known, [0.2 - 1e-8] * 100 + [0.5 + 1e-8] * 200, 1).distance == 0


@pytest.mark.parametrize("scores", [[], [float("nan")], [0.1, float("inf")]])
def test_what_is_no_reference_is_refused(scores: list[float]) -> None:
    with pytest.raises(InvalidInput):
        reference(scores)
