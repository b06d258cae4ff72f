"""Do the scores of today look like those that the router was fitted for?

The two-sample Kolmogorov-Smirnov distance, taken at the quantiles of the reference. Windows do not
overlap, and the k-th may raise a false alarm with probability alpha * 6 / (pi k)^2: over any number
of windows these sum to alpha, so where nothing changes a router never raises an alarm with
probability 1 - alpha at least.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from pliant.errors import InvalidInput
from pliant.routing.live_settings import Drift

QUANTILES = 64
_ROUNDING = 1e-5
"""A saved scorer's scores differ by less from those before it was saved."""


@dataclass(frozen=True)
class Window:
    """One window compared with the reference."""

    number: int
    """Counted from 1."""
    distance: float
    """The largest difference between the shares of scores up to a point, in [0, 1]."""
    bound: float
    """What chance stays below."""
    mean: float
    """Of the window's scores."""
    size: int
    """How many they are."""

    @property
    def drifted(self) -> bool:
        return self.distance > self.bound


def reference(scores: Sequence[float], window: int = 500, false_alarms: float = 0.01) -> Drift:
    """What a router's file stores of the scores that it was fitted for."""
    ascending = sorted(map(float, scores))
    n = len(ascending)
    if not n or not all(map(math.isfinite, ascending)):
        raise InvalidInput("a reference for drift needs one finite score or more")
    steps = {ascending[min(n - 1, i * n // QUANTILES)] for i in range(QUANTILES + 1)}
    # Around each, for scores in steps: a shift between two steps is noticed, rounding is not.
    at = sorted({x + around for x in steps for around in (-_ROUNDING, _ROUNDING)})
    below = [bisect_right(ascending, x) / n for x in at]
    return Drift(edges=at, below=below, n=n, window=window, false_alarms=false_alarms)


def compare(drift: Drift, scores: Sequence[float], number: int) -> Window:
    """A window's scores compared with the reference."""
    ascending = sorted(scores)
    m = len(ascending)
    shares = [bisect_right(ascending, x) / m for x in drift.edges]
    distance = max(abs(a - b) for a, b in zip(shares, drift.below, strict=True))
    # The distance between two edges is not computed, so this is a lower limit of it.
    return Window(number, distance, bound(drift, m, number), sum(ascending) / m, m)


def bound(drift: Drift, m: int, number: int) -> float:
    """The distance that two samples of one distribution exceed with this window's share of alpha.

    Massart's inequality, P(D > x) <= 2 exp(-2 x^2), for x = D sqrt(n m / (n + m)).
    """
    alpha = drift.false_alarms * 6 / (math.pi * number) ** 2
    return math.sqrt(math.log(2 / alpha) / 2 * (drift.n + m) / (drift.n * m))
