"""A calibration finds the bend that was put in, keeps the order, and is read as it was written."""

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


def test_the_bend_is_found() -> None:
    assert Temperature.fit(*bent(0.5, 0)).temperature == pytest.approx(2, rel=0.05)
    found = Platt.fit(*bent(0.5, -0.7))
    assert (found.slope, found.shift) == pytest.approx((0.5, -0.7), abs=0.05)


def test_platt_is_what_logistic_regression_finds() -> None:
    from sklearn.linear_model import LogisticRegression

    p, y = bent(1.7, 0.4, 500)
    other = LogisticRegression(C=1e9, tol=1e-10).fit(np.log(p / (1 - p))[:, None], y)
    found = Platt.fit(p, y)
    assert found.slope == pytest.approx(other.coef_[0, 0], rel=1e-3)
    assert found.shift == pytest.approx(other.intercept_[0], rel=1e-3)


@pytest.mark.parametrize("kind", ["platt", "isotonic"])
def test_other_prompts_are_better_calibrated_after_it(kind: str) -> None:
    kept = fit(kind, *bent(0.4, 0.6, seed=0))
    p, y = bent(0.4, 0.6, seed=1)
    assert ece(p, y) > 0.1 and ece(kept.apply(p), y) < 0.01
    assert brier(kept.apply(p), y) < brier(p, y)


@given(pairs, st.sampled_from(list(CALIBRATIONS)))
def test_it_keeps_the_order_and_stays_in_range(
    pair: tuple[np.ndarray, np.ndarray], kind: str
) -> None:
    kept = fit(kind, *pair)
    along = kept.apply(np.linspace(0, 1, 101))
    assert (np.diff(along) >= -1e-12).all()
    assert (along >= 0).all() and (along <= 1).all()


@given(pairs, st.sampled_from(list(CALIBRATIONS)))
def test_it_is_read_as_it_was_written(pair: tuple[np.ndarray, np.ndarray], kind: str) -> None:
    kept = fit(kind, *pair)
    again = from_json(json.loads(json.dumps(kept.to_json(), allow_nan=False)))
    assert again == kept
    assert (again.apply(pair[0]) == kept.apply(pair[0])).all()


@pytest.mark.parametrize("kind", CALIBRATIONS)
def test_what_is_told_apart_without_a_mistake_stays_finite(kind: str) -> None:
    p = np.array([0.1, 0.2, 0.8, 0.9])
    for y in (p > 0.5, p < 0.5, p > 2, p < 2):
        along = fit(kind, p, y.astype(float)).apply(np.array([0.0, 0.5, 1.0]))
        assert np.isfinite(along).all() and (np.diff(along) >= 0).all()


def test_a_ranking_that_is_upside_down_becomes_the_base_rate() -> None:
    p, y = bent(-1, 0.5)
    kept = Platt.fit(p, y)
    assert kept.slope == 0
    assert kept.apply(p) == pytest.approx(np.full(len(p), y.mean()))


def test_isotonic_takes_gains() -> None:
    kept = Isotonic.fit([-3.0, 0.0, 5.0, 9.0], [-1.0, 0.0, 1.0, 0.0])
    assert kept.apply([-9.0, 0.0, 9.0]).tolist() == [-1.0, 0.0, 0.5]


@pytest.mark.parametrize(
    ("content", "said"),
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
def test_a_file_that_is_none_of_ours_is_refused(content: dict[str, object], said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        from_json(content)


@pytest.mark.parametrize(
    ("p", "y"), [([], []), ([0.5], [0, 1]), ([np.nan], [1]), ([1.5], [1]), ([0.5], [-1])]
)
def test_what_cannot_be_fitted_is_refused(p: list[float], y: list[float]) -> None:
    with pytest.raises(InvalidInput):
        fit("platt", p, y)
