"""Calibration: from what a scorer says to how often it is so, fitted on a split of its own.

    kept = Platt.fit(p, y)              # p: predicted on the calibration split, y: what happened
    kept.apply(p_of_other_prompts)
    from_json(kept.to_json())           # as it lies in a router's file

All three keep the order of the predictions; isotonic regression makes ties, which a router can no
longer tell apart: rank with what went in, and promise with what comes out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pliant.data import nearest
from pliant.errors import InvalidInput
from pliant.stats import sigmoid

Floats = NDArray[np.float64]
_CLIP = 1e-6  # a probability of 0 or 1 has no logit


class Calibration(Protocol):
    kind: str

    @classmethod
    def fit(cls, p: ArrayLike, y: ArrayLike) -> Self: ...

    def apply(self, p: ArrayLike) -> Floats: ...

    def to_json(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Temperature:
    """sigmoid(logit(p) / T), with the T of the highest likelihood. It leaves 1/2 where it is."""

    temperature: float
    kind: str = "temperature"

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise InvalidInput(f"temperature={self.temperature}: a number above 0 is due")

    @classmethod
    def fit(cls, p: ArrayLike, y: ArrayLike) -> Temperature:
        slope, _ = _most_likely(*_checked(p, y), shifted=False)
        return cls(1 / slope)

    def apply(self, p: ArrayLike) -> Floats:
        return sigmoid(_logit(p) / self.temperature)

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "temperature": self.temperature}


@dataclass(frozen=True)
class Platt:
    """sigmoid(slope * logit(p) + shift), of the highest likelihood: temperature and base rate.

    A slope below 0 would turn the ranking round: it is held at 0, where only the base rate is left.
    """

    slope: float
    shift: float
    kind: str = "platt"

    def __post_init__(self) -> None:
        if not (0 <= self.slope < math.inf and math.isfinite(self.shift)):
            raise InvalidInput(f"slope={self.slope}, shift={self.shift}: numbers, slope 0 or more")

    @classmethod
    def fit(cls, p: ArrayLike, y: ArrayLike) -> Platt:
        return cls(*_most_likely(*_checked(p, y), shifted=True))

    def apply(self, p: ArrayLike) -> Floats:
        return sigmoid(self.slope * _logit(p) + self.shift)

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "slope": self.slope, "shift": self.shift}


@dataclass(frozen=True)
class Isotonic:
    """The nearest non-decreasing function, in steps joined by lines; level beyond both ends.

    It takes any score, and gains in [-1, 1] as well as probabilities.
    """

    x: tuple[float, ...]
    y: tuple[float, ...]
    kind: str = "isotonic"

    @classmethod
    def fit(cls, p: ArrayLike, y: ArrayLike) -> Isotonic:
        from sklearn.isotonic import IsotonicRegression

        p, y = _finite(p, "p"), _finite(y, "y")
        _refuse_unlike(p, y)
        found = IsotonicRegression(out_of_bounds="clip").fit(p, y)
        return cls(tuple(found.X_thresholds_.tolist()), tuple(found.y_thresholds_.tolist()))

    def apply(self, p: ArrayLike) -> Floats:
        return np.interp(np.asarray(p, dtype=np.float64), self.x, self.y)

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "x": list(self.x), "y": list(self.y)}


CALIBRATIONS: dict[str, type[Temperature] | type[Platt] | type[Isotonic]] = {
    "temperature": Temperature,
    "platt": Platt,
    "isotonic": Isotonic,
}


def fit(kind: str, p: ArrayLike, y: ArrayLike) -> Temperature | Platt | Isotonic:
    """The calibration of that name, fitted."""
    return _kind(kind).fit(p, y)


def from_json(content: dict[str, Any]) -> Temperature | Platt | Isotonic:
    """What `to_json` gave."""
    kind = _kind(str(content.get("kind")))
    given = {name: value for name, value in content.items() if name != "kind"}
    if kind is Isotonic:
        x, y = (tuple(map(float, given.pop(name, ()))) for name in ("x", "y"))
        if not x or len(x) != len(y) or list(x) != sorted(x) or list(y) != sorted(y):
            raise InvalidInput("isotonic: x and y are due, of one length and ascending")
        given |= {"x": x, "y": y}
    try:
        return kind(**given)
    except TypeError as error:
        raise InvalidInput(f"calibration {content.get('kind')}: {error}") from error


# --- how it is fitted ----------------------------------------------------------------------------


def _most_likely(p: Floats, y: Floats, shifted: bool) -> tuple[float, float]:
    """Slope and shift of the highest likelihood, by Newton's method; the slope in [.01, 100].

    With a `shift` the slope may fall to 0. A faint pull towards (1, 0) keeps both finite where the
    classes are told apart without a mistake.
    """
    z, pull = _logit(p), 1e-3
    slope, shift = 1.0, 0.0
    for _ in range(100):
        now = sigmoid(slope * z + shift)
        error, weight = now - y, now * (1 - now)
        down = np.array([error @ z + pull * (slope - 1), error.sum() + pull * shift])
        bend = np.array([[weight @ z**2 + pull, weight @ z], [weight @ z, weight.sum() + pull]])
        step = np.linalg.solve(bend, down) if shifted else np.array([down[0] / bend[0, 0], 0.0])
        step = np.clip(step, -1, 1)  # a full step can overshoot far from the best
        slope, shift = slope - float(step[0]), shift - float(step[1])
        if np.abs(step).max() < 1e-10:
            break
    if shifted and slope < 0:
        return 0.0, float(_logit(np.array([y.mean()]))[0])
    return (slope, shift) if shifted else (min(max(slope, 0.01), 100.0), 0.0)


def _kind(name: str) -> type[Temperature] | type[Platt] | type[Isotonic]:
    if name not in CALIBRATIONS:
        raise InvalidInput(f"no calibration {name!r}{nearest(name, CALIBRATIONS)}")
    return CALIBRATIONS[name]


def _checked(p: ArrayLike, y: ArrayLike) -> tuple[Floats, Floats]:
    p, y = _finite(p, "p"), _finite(y, "y")
    _refuse_unlike(p, y)
    for name, values in (("p", p), ("y", y)):
        if values.min() < 0 or values.max() > 1:
            raise InvalidInput(f"{name}: values in [0, 1] are due")
    return p, y


def _finite(values: ArrayLike, name: str) -> Floats:
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 1 or not len(found) or not np.isfinite(found).all():
        raise InvalidInput(f"{name}: a row of finite numbers is due")
    return found


def _refuse_unlike(p: Floats, y: Floats) -> None:
    if len(p) != len(y):
        raise InvalidInput(f"{len(p)} predictions for {len(y)} outcomes")


def _logit(p: ArrayLike) -> Floats:
    kept = np.clip(np.asarray(p, dtype=np.float64), _CLIP, 1 - _CLIP)
    return np.log(kept / (1 - kept))
