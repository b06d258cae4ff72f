"""Bands cover what they should, and a calibration error is 0 where there is none."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pliant import stats
from pliant.errors import InvalidInput
from pliant.stats import Band, as_difference, bootstrap, bootstrap_counts, brier_skill, ece, paired

shares = st.floats(0, 1, allow_subnormal=False)
columns = st.integers(1, 60).flatmap(
    lambda n: st.tuples(arrays(float, n, elements=shares), arrays(float, n, elements=shares))
)


@given(arrays(float, st.integers(1, 40), elements=st.floats(-1e3, 1e3)), st.integers(0, 5))
def test_a_band_contains_its_value(values: np.ndarray, seed: int) -> None:
    for band, value in (
        (bootstrap(lambda rows: float(values[rows].mean()), len(values), 50, seed), values.mean()),
        (bootstrap(lambda rows: float(values[rows].max()), len(values), 50, seed), values.max()),
    ):
        assert band.low <= band.value <= band.high
        assert band.value == pytest.approx(value)


def test_a_band_covers_the_population_as_often_as_it_says() -> None:
    """Of 400 bands at a level of .9, 360 are expected to cover, give or take 4 x 6."""
    rng = np.random.default_rng(0)
    covered = 0
    for i in range(400):
        values = rng.exponential(size=100)
        band = bootstrap_counts(lambda c, v=values: c @ v / c.sum(axis=1), 100, 300, i, 0.9)
        covered += not band.excludes(1.0)
    assert 336 <= covered <= 384


def test_the_limits_are_percentiles_of_the_resamples() -> None:
    values = np.random.default_rng(2).normal(size=50)
    means = [values[rows].mean() for rows in stats.draws(50, 500, 7)]
    band = bootstrap(lambda rows: float(values[rows].mean()), 50, 500, 7, level=0.8)
    assert (band.low, band.high) == pytest.approx(tuple(np.quantile(means, [0.1, 0.9])))


def test_counts_and_indices_are_the_same_draws() -> None:
    values = np.random.default_rng(1).normal(size=70)
    groups = [i % 9 for i in range(70)]
    for clusters in (None, groups):
        by_rows = bootstrap(lambda rows: float(values[rows].mean()), 70, 80, 3, 0.95, clusters)
        by_counts = bootstrap_counts(
            lambda c: c @ values / c.sum(axis=1), 70, 80, 3, 0.95, clusters
        )
        assert by_counts.as_dict() == pytest.approx(by_rows.as_dict())


def test_a_paired_difference_is_narrower_than_two_bands_suggest() -> None:
    rng = np.random.default_rng(0)
    hard = rng.normal(size=500)
    a, b = hard + 0.05 + rng.normal(scale=0.1, size=500), hard

    def mean(x: np.ndarray) -> stats.Statistic:
        return lambda rows: float(x[rows].mean())

    apart = paired(mean(a), mean(b), 500)
    assert apart.excludes(0)
    assert not bootstrap(mean(a), 500).excludes(float(b.mean()))
    assert paired(mean(a), mean(a), 500).as_dict()["high"] == 0


def test_clusters_are_drawn_whole() -> None:
    groups = np.repeat(np.arange(10), 20)
    for rows in stats.draws(200, 20, 0, list(groups)):
        counts = np.bincount(rows, minlength=200).reshape(10, 20)
        assert (counts == counts[:, :1]).all() and counts[:, 0].sum() == 10
    alike = groups.astype(float)  # all rows of a cluster say the same: 10 facts, not 200
    narrow = bootstrap(lambda rows: float(alike[rows].mean()), 200)
    wide = bootstrap(lambda rows: float(alike[rows].mean()), 200, clusters=list(groups))
    assert wide.high - wide.low > 3 * (narrow.high - narrow.low)


def test_what_is_undefined_stays_so() -> None:
    band = bootstrap(lambda rows: math.nan, 5, 10)
    assert math.isnan(band.value) and not band.excludes(0)
    assert band.as_dict() == {"value": None, "low": None, "high": None, "level": 0.95}
    some = bootstrap(lambda rows: math.nan if 0 in rows[1:] else 1.0, 5, 100)
    assert (some.low, some.high) == (1.0, 1.0)


def test_a_band_in_words() -> None:
    assert str(Band(0.5, 0.25, 0.75)) == "0.500 [0.250, 0.750]"
    assert Band(0.5, 0.25, 0.75).excludes(0.2) and not Band(0.5, 0.25, 0.75).excludes(0.3)


@pytest.mark.parametrize(
    ("n", "how", "error"),
    [
        (0, {}, "rows and resamples"),
        (3, {"resamples": 0}, "rows and resamples"),
        (3, {"level": 95}, "level=95"),
        (3, {"clusters": ["a"]}, "1 cluster names for 3 rows"),
    ],
)
def test_a_bootstrap_checks_its_arguments(n: int, how: dict[str, object], error: str) -> None:
    with pytest.raises(InvalidInput, match=error):
        bootstrap(lambda rows: 0.0, n, **how)  # type: ignore[arg-type]


# --- calibration ---------------------------------------------------------------------------------


def drawn(n: int, seed: int, bend: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities, and outcomes that come true with p^(1 + bend)."""
    rng = np.random.default_rng(seed)
    p = rng.beta(1, 1, n)
    return p, (rng.random(n) < p ** (1 + bend)).astype(float)


def test_the_calibration_error_of_what_is_calibrated_is_near_0() -> None:
    plain = np.mean([ece(*drawn(2000, i), debias=False) for i in range(60)])
    debiased = np.mean([ece(*drawn(2000, i)) for i in range(60)])
    assert plain > 0.02 and debiased < 0.01


def test_a_true_calibration_error_is_found_with_and_without_debiasing() -> None:
    truth = 1 / 2 - 1 / 4  # mean of p - p^3 over [0, 1]
    for debias in (False, True):
        estimate = np.mean([ece(*drawn(4000, i, bend=2), debias=debias) for i in range(20)])
        assert estimate == pytest.approx(truth, abs=0.005)


@given(columns, st.randoms())
def test_no_score_depends_on_the_order_of_the_rows(
    pair: tuple[np.ndarray, np.ndarray], random: object
) -> None:
    p, y = pair
    order = list(range(len(p)))
    random.shuffle(order)  # type: ignore[attr-defined]
    for score in (ece, stats.brier, stats.auc):
        assert score(p[order], y[order]) == pytest.approx(score(p, y), nan_ok=True)


@given(columns)
def test_the_calibration_error_is_the_gap_where_all_predictions_are_equal(
    pair: tuple[np.ndarray, np.ndarray],
) -> None:
    y = pair[1]
    assert ece(np.full_like(y, 0.3), y, debias=False) == pytest.approx(abs(y.mean() - 0.3))
    assert ece(np.full_like(y, 0.3), y) <= abs(y.mean() - 0.3) + 1e-12


def test_brier_and_its_skill() -> None:
    y = np.array([0.0, 0.0, 0.0, 1.0])
    assert stats.brier(y, y) == 0 and brier_skill(y, y) == 1
    assert stats.brier(np.full(4, 0.5), y) == 0.25
    assert brier_skill(np.full(4, 0.25), y) == 0
    assert brier_skill(np.full(4, 0.25), y, base=0.5) == pytest.approx(0.25)
    assert brier_skill(1 - y, y) < 0
    assert math.isnan(brier_skill(np.zeros(4), np.zeros(4)))


@given(columns)
def test_auc_is_what_sklearn_says_and_turns_round(pair: tuple[np.ndarray, np.ndarray]) -> None:
    from sklearn.metrics import roc_auc_score

    p, y = np.round(pair[0], 1), (pair[1] > 0.5).astype(float)
    if 0 < y.sum() < len(y):
        assert stats.auc(p, y) == pytest.approx(roc_auc_score(y, p))
        assert stats.auc(-p, y) == pytest.approx(1 - stats.auc(p, y))
    else:
        assert math.isnan(stats.auc(p, y))


def test_a_share_counts_as_so_many_outcomes() -> None:
    score, share = np.array([0.1, 0.4, 0.8]), np.array([0.25, 0.5, 1.0])
    as_outcomes = np.concatenate([[1] * int(4 * s) + [0] * int(4 - 4 * s) for s in share])
    assert stats.auc(score, share) == pytest.approx(stats.auc(np.repeat(score, 4), as_outcomes))


@pytest.mark.parametrize(
    ("p", "y", "error"),
    [
        ([0.5, 1.2], [0, 1], "p has values outside"),
        ([0.5, 0.2], [0, 2], "y has values outside"),
        ([0.5], [0, 1], "equal length"),
        ([], [], "equal length"),
        ([np.nan], [0], "NaN"),
    ],
)
def test_scores_check_their_arguments(p: list[float], y: list[float], error: str) -> None:
    with pytest.raises(InvalidInput, match=error):
        ece(p, y)
    with pytest.raises(InvalidInput):
        ece([0.5], [1], bins=0)


def test_differences_of_probabilities_lie_within_one_in_the_order_of_the_fit() -> None:
    fitted = np.linspace(-9, 9, 3601)
    limited = as_difference(fitted)
    assert (np.abs(limited) < 1).all() and (np.diff(limited) > 0).all()
    inside = np.abs(fitted) <= 0.95
    assert (limited[inside] == fitted[inside]).all()
