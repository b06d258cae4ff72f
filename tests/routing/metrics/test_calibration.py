"""A calibration recovers the true curve, keeps the order, and is read as it was written."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pliant.errors import InvalidInput
from pliant.routing.metrics.calibration import (
    CALIBRATIONS,
    Isotonic,
    Platt,
    Temperature,
    fit,
    from_json,
)
from pliant.stats import brier, ece

pairs = st.integers(2, 50).flatmap(
    lambda n: st.tuples(
        arrays(float, n, elements=st.floats(0, 1)),
        arrays(float, n, elements=st.sampled_from([0.0, 0.5, 1.0])),
    )
)


def bent(
    slope: float, shift: float, n: int = 20_000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Predictions whose truth is sigmoid(slope * logit + shift), and what came true."""
    rng = np.random.default_rng(seed)
    z = rng.normal(scale=1.5, size=n)
    truth = 1 / (1 + np.exp(-(slope * z + shift)))
    return 1 / (1 + np.exp(-z)), (rng.random(n) < truth).astype(float)


def test_the_true_curve_is_recovered() -> None:
    assert Temperature.fit(*bent(0.5, 0)).temperature == pytest.approx(2, rel=0.05)
    fitted = Platt.fit(*bent(0.5, -0.7))
    assert (fitted.slope, fitted.shift) == pytest.approx((0.5, -0.7), abs=0.05)


def by_scikit_learn(p: np.ndarray, y: np.ndarray, shifted: bool) -> tuple[float, float]:
    """Without a penalty; each outcome y is y times right and 1 - y times wrong."""
    from sklearn.linear_model import LogisticRegression

    z, weight = np.tile(np.log(p / (1 - p)), 2)[:, None], np.concatenate([y, 1 - y])
    model = LogisticRegression(C=np.inf, fit_intercept=shifted, tol=1e-10, max_iter=1000)
    used = weight > 0
    model.fit(z[used], np.repeat([1, 0], len(y))[used], sample_weight=weight[used])
    return float(model.coef_[0, 0]), float(np.ravel(model.intercept_)[0])


@pytest.mark.parametrize("n", [90, 1000])
def test_platt_and_temperature_are_what_logistic_regression_finds(n: int) -> None:
    p, y = bent(1.7, 0.4, n)
    y = (y + bent(1.7, 0.4, n, seed=1)[1]) / 2  # shares, as of several samples
    fitted = Platt.fit(p, y)
    assert (fitted.slope, fitted.shift) == pytest.approx(by_scikit_learn(p, y, True), rel=1e-3)
    slope, _ = by_scikit_learn(p, y, False)
    assert 1 / Temperature.fit(p, y).temperature == pytest.approx(slope, rel=1e-3)


def test_why_it_is_not_left_to_scikit_learn() -> None:
    """Without a pull its slope is whatever the solver stops at, and one class is refused."""
    p = np.array([0.1, 0.2, 0.8, 0.9] * 20)
    separable, alike = (p > 0.5).astype(float), np.ones(80)
    assert Platt.fit(p, separable).slope < 10 < by_scikit_learn(p, separable, True)[0]
    with pytest.raises(ValueError, match="one class"):
        by_scikit_learn(p, alike, True)
    assert 0.999 < Platt.fit(p, alike).apply([0.5])[0] < 1


@pytest.mark.parametrize("kind", ["platt", "isotonic"])
def test_other_prompts_are_better_calibrated_after_it(kind: str) -> None:
    fitted = fit(kind, *bent(0.4, 0.6, seed=0))
    p, y = bent(0.4, 0.6, seed=1)
    assert ece(p, y) > 0.1 and ece(fitted.apply(p), y) < 0.01
    assert brier(fitted.apply(p), y) < brier(p, y)


@given(pairs, st.sampled_from(list(CALIBRATIONS)))
def test_it_keeps_the_order_and_stays_in_range(
    pair: tuple[np.ndarray, np.ndarray], kind: str
) -> None:
    fitted = fit(kind, *pair)
    along = fitted.apply(np.linspace(0, 1, 101))
    assert (np.diff(along) >= -1e-12).all()
    assert (along >= 0).all() and (along <= 1).all()


@given(pairs, st.sampled_from(list(CALIBRATIONS)))
def test_it_is_read_as_it_was_written(pair: tuple[np.ndarray, np.ndarray], kind: str) -> None:
    fitted = fit(kind, *pair)
    again = from_json(json.loads(json.dumps(fitted.to_json(), allow_nan=False)))
    assert again == fitted
    assert (again.apply(pair[0]) == fitted.apply(pair[0])).all()


@pytest.mark.parametrize("kind", CALIBRATIONS)
def test_separable_and_constant_outcomes_stay_finite(kind: str) -> None:
    p = np.array([0.1, 0.2, 0.8, 0.9])
    for y in (p > 0.5, p < 0.5, p > 2, p < 2):
        along = fit(kind, p, y.astype(float)).apply(np.array([0.0, 0.5, 1.0]))
        assert np.isfinite(along).all() and (np.diff(along) >= 0).all()


def test_a_ranking_that_is_upside_down_becomes_the_base_rate() -> None:
    p, y = bent(-1, 0.5)
    fitted = Platt.fit(p, y)
    assert fitted.slope == 0
    assert fitted.apply(p) == pytest.approx(np.full(len(p), y.mean()))


def test_isotonic_takes_gains() -> None:
    fitted = Isotonic.fit([-3.0, 0.0, 5.0, 9.0], [-1.0, 0.0, 1.0, 0.0])
    assert fitted.apply([-9.0, 0.0, 9.0]).tolist() == [-1.0, 0.0, 0.5]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"kind": "temprature"}, "did you mean 'temperature'"),
        ({}, "no calibration 'None'"),
        ({"kind": "temperature"}, "temperature"),
        ({"kind": "temperature", "temperature": 0}, "above 0"),
        ({"kind": "platt", "slope": -1, "shift": 0}, "slope 0 or more"),
        ({"kind": "platt", "slope": 1, "shift": 0, "bias": 1}, "bias"),
        ({"kind": "isotonic", "x": [0, 1], "y": [1, 0]}, "ascending"),
        ({"kind": "isotonic", "x": [0], "y": []}, "of one length"),
    ],
)
def test_a_file_that_is_none_of_ours_is_refused(content: dict[str, object], expected: str) -> None:
    with pytest.raises(InvalidInput, match=expected):
        from_json(content)


@pytest.mark.parametrize(
    ("p", "y"), [([], []), ([0.5], [0, 1]), ([np.nan], [1]), ([1.5], [1]), ([0.5], [-1])]
)
def test_what_cannot_be_fitted_is_refused(p: list[float], y: list[float]) -> None:
    with pytest.raises(InvalidInput):
        fit("platt", p, y)
