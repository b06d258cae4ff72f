"""Calibration: from a scorer's probability to how often it comes true, fitted on its own split.

    platt = Platt.fit(p, y)             # p: predicted on the calibration split, y: what came true
    platt.apply(p_of_other_prompts)
    from_json(platt.to_json())          # as in a router's file

All three keep the order of the predictions. Isotonic regression makes ties, which a router can no
longer tell apart: rank with its input, and promise with its output.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from pliant.errors import InvalidInput, did_you_mean
from pliant.stats import Floats, as_json, logit, probabilities, sigmoid, vectors

_MARGIN = 1e-6  # a probability of 0 or 1 has no logit


class Saved:
    """A calibration goes into a file as its kind and its numbers."""

    kind: str

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, **as_json(self)}


@dataclass(frozen=True)
class Temperature(Saved):
    """sigmoid(logit(p) / T), with the T of the highest likelihood. 1/2 stays 1/2."""

    temperature: float
    kind: str = "temperature"

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise InvalidInput(f"temperature={self.temperature}: it must be above 0 and finite")

    @classmethod
    def fit(cls, p: ArrayLike, y: ArrayLike) -> Temperature:
        slope, _ = _most_likely(*probabilities(p, y), shifted=False)
        return cls(1 / slope)

    def apply(self, p: ArrayLike) -> Floats:
        return sigmoid(logit(p, _MARGIN) / self.temperature)


@dataclass(frozen=True)
class Platt(Saved):
    """sigmoid(slope * logit(p) + shift), of the highest likelihood: temperature and base rate.

    A slope below 0 would reverse the ranking: it becomes 0, where only the base rate is left.
    """

    slope: float
    shift: float
    kind: str = "platt"

    def __post_init__(self) -> None:
        if not (0 <= self.slope < math.inf and math.isfinite(self.shift)):
            raise InvalidInput(
                f"slope={self.slope}, shift={self.shift}: both must be finite, slope 0 or more"
            )

    @classmethod
    def fit(cls, p: ArrayLike, y: ArrayLike) -> Platt:
        return cls(*_most_likely(*probabilities(p, y), shifted=True))

    def apply(self, p: ArrayLike) -> Floats:
        return sigmoid(self.slope * logit(p, _MARGIN) + self.shift)


@dataclass(frozen=True)
class Isotonic(Saved):
    """The nearest non-decreasing function, in steps joined by lines; level beyond both ends.

    It takes any score, and gains in [-1, 1] as well as probabilities.
    """

    x: tuple[float, ...]
    y: tuple[float, ...]
    kind: str = "isotonic"

    @classmethod
    def fit(cls, p: ArrayLike, y: ArrayLike) -> Isotonic:
        from sklearn.isotonic import IsotonicRegression

        p, y = vectors(p, y)
        if not (np.isfinite(p).all() and np.isfinite(y).all()):
            raise InvalidInput("p and y must be finite")
        fitted = IsotonicRegression(out_of_bounds="clip").fit(p, y)
        return cls(tuple(fitted.X_thresholds_.tolist()), tuple(fitted.y_thresholds_.tolist()))

    def apply(self, p: ArrayLike) -> Floats:
        return np.interp(np.asarray(p, dtype=np.float64), self.x, self.y)


Calibration = Temperature | Platt | Isotonic
CALIBRATIONS: dict[str, type[Calibration]] = {
    kind.kind: kind for kind in (Temperature, Platt, Isotonic)
}


def fit(kind: str, p: ArrayLike, y: ArrayLike) -> Calibration:
    """The calibration of that name, fitted."""
    return kind_class(kind).fit(p, y)


def from_json(content: dict[str, Any]) -> Calibration:
    """Read what `to_json` wrote."""
    kind = kind_class(str(content.get("kind")))
    fields = {name: value for name, value in content.items() if name != "kind"}
    if kind is Isotonic:
        x, y = (tuple(map(float, fields.pop(name, ()))) for name in ("x", "y"))
        if not x or len(x) != len(y) or list(x) != sorted(x) or list(y) != sorted(y):
            raise InvalidInput("isotonic: x and y must be of one length and ascending")
        fields |= {"x": x, "y": y}
    try:
        return kind(**fields)
    except TypeError as error:
        raise InvalidInput(f"calibration {content.get('kind')}: {error}") from error


# --- how it is fitted ----------------------------------------------------------------------------


def _most_likely(p: Floats, y: Floats, shifted: bool) -> tuple[float, float]:
    """Slope and shift of the highest likelihood, by Newton's method; the slope in [.01, 100].

    With a `shift` the slope may fall to 0. A weak pull towards (1, 0) keeps both finite where the
    classes are separable. scikit-learn's LogisticRegression agrees to 1e-4, but cannot be pulled
    towards slope 1: its slope for separable classes depends on its tolerance, and it refuses
    outcomes that are all alike (tests/routing/metrics/test_calibration.py).
    """
    z, pull = logit(p, _MARGIN), 1e-3
    slope, shift = 1.0, 0.0
    for _ in range(100):
        predicted = sigmoid(slope * z + shift)
        error, weight = predicted - y, predicted * (1 - predicted)
        gradient = np.array([error @ z + pull * (slope - 1), error.sum() + pull * shift])
        hessian = np.array([[weight @ z**2 + pull, weight @ z], [weight @ z, weight.sum() + pull]])
        if shifted:
            step = np.linalg.solve(hessian, gradient)
        else:
            step = np.array([gradient[0] / hessian[0, 0], 0.0])
        step = np.clip(step, -1, 1)  # a full step can overshoot
        slope, shift = slope - float(step[0]), shift - float(step[1])
        if np.abs(step).max() < 1e-10:
            break
    if shifted and slope < 0:
        return 0.0, float(logit(y.mean(), _MARGIN))
    return (slope, shift) if shifted else (min(max(slope, 0.01), 100.0), 0.0)


def kind_class(name: str) -> type[Calibration]:
    """The class of a kind; the error about an unknown kind names those like it."""
    if name not in CALIBRATIONS:
        raise InvalidInput(f"no calibration {name!r}{did_you_mean(name, CALIBRATIONS)}")
    return CALIBRATIONS[name]
