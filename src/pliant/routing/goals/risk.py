"""Statistical tests that a promise holds for new prompts, and not only for the calibration split.

The loss of a prompt lies in [-1, 1]: the quality of the strong model less that of the router.
`proves_below(losses, limit, delta)` is true only if the mean loss of the population is proved to
be below `limit`: where it is not, the result is true with a probability of at most delta, for any
number of prompts and any population.

The test of n losses of -1, 0 and 1 (labels that are right or wrong): with d the sum and k the
number of losses other than 0, it passes where

    d <= n * limit - z * sqrt(max(k - n * limit^2, 0) + 4)

the distance from the limit in standard errors, as in a score test. z is not the normal
distribution's, which holds for large n alone: it is the lowest z with which no population whose
mean is the limit passes more often than delta. Such a population has one free number, the share s
of prompts with a loss of either sign: k is binomial, and so are the gains among these k. The chance
is summed exactly for many s between the limit and 1. Fewer losses or more gains always pass where
more losses do, so a population with a higher mean passes less often. z is within 10 % of the normal
distribution's from 60 prompts on, so little is given away.

Other losses (several samples, several wordings) are rounded at random to -1, 0 or 1 so that their
mean stays what it is: the test is then as exact, and the rounding adds to the variance.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from pliant.stats import Floats

Counts = NDArray[np.int64]

# Close to (log(delta) / z)^2, the value with which a split without any loss passes where it should:
# 3.3 at .05, 3.7 at .2.
_EXTRA = 4.0
_FINEST = 0.01  # of z


def proves_below(losses: Floats, limit: float, delta: float, seed: int = 0) -> bool:
    """Whether the mean of the losses' population is proved to be below the limit."""
    return passes(whole(losses, seed), highest_sums(len(losses), limit, delta))


def passes(losses: Floats, highest: Counts) -> bool:
    """The test itself, for losses of -1, 0 and 1 and what `highest_sums` returned."""
    return bool(losses.sum() <= highest[np.count_nonzero(losses)])


def whole(losses: Floats, seed: int = 0) -> Floats:
    """Losses of -1, 0 and 1 with the same mean in the population, by rounding at random.

    One draw for each row, whatever the losses: so nearly equal losses are rounded alike.
    """
    draws = np.random.default_rng(seed).random(len(losses))
    return np.asarray(np.sign(losses) * (draws < np.abs(losses)))


@lru_cache(maxsize=64)
def highest_sums(n: int, limit: float, delta: float) -> Counts:
    """(n + 1,) the highest sum of losses that passes, by how many losses are not 0."""
    if limit >= 1:  # which no mean exceeds
        return np.full(n + 1, n)
    shares, tail = _shares(n, limit), min(1e-7, delta / 1000)
    hardest = shares[:1]  # the population that passed too often at the last z that was too low

    def holds(z: float) -> bool:
        nonlocal hardest
        highest = _boundary(n, limit, z)
        for share in np.concatenate([hardest, shares]):
            if _chance(n, limit, float(share), highest, tail) > delta:
                hardest = np.array([share])
                return False
        return True

    low, high = 0.0, _normal(delta) + 0.1
    while not holds(high):
        low, high = high, high + 0.2
    low = max(low, 0.9 * _normal(delta))
    while high - low > _FINEST:
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return _boundary(n, limit, high)


def lowest_share(right: Floats, delta: float, seed: int = 0) -> float:
    """A lower bound of the share that is right in the population (Clopper and Pearson)."""
    from scipy.special import betaincinv

    n, count = len(right), int(whole(right, seed).sum())
    return 0.0 if count == 0 else float(betaincinv(count, n - count + 1, delta))


def _normal(delta: float) -> float:
    from scipy.special import ndtri

    return max(0.0, -float(ndtri(delta)))


def _shares(n: int, limit: float) -> Floats:
    """The shares s that are tried: a fraction of a standard error of k apart, or less."""
    tried = min(160, int(6 * math.sqrt(n)) + 40)
    roots = np.linspace(math.sqrt(limit), 1, tried + 1)
    return np.asarray(roots**2) if limit > 0 else np.asarray(roots[1:] ** 2)


def _boundary(n: int, limit: float, z: float) -> Counts:
    k = np.arange(n + 1)
    # With more than this, a further gain may count against the router (z / (2 sqrt(extra)) > 1).
    extra = max(_EXTRA, z * z / 4)
    error = np.sqrt(np.maximum(k - n * limit**2, 0) + extra)
    return np.floor(n * limit - z * error + 1e-9).astype(np.int64)


def _chance(n: int, limit: float, share: float, highest: Counts, tail: float = 1e-7) -> float:
    """How often n losses pass, of a population with this mean and share of losses but 0.

    The `tail` of k is not summed and counts as if all of it passed.
    """
    from scipy.special import betainc, gammaln

    reach = 1 + math.sqrt(-2 * math.log(tail / 2) * n * share * (1 - share)) - math.log(tail)
    k = np.arange(max(0, math.floor(n * share - reach)), min(n, math.ceil(n * share + reach)) + 1)
    with np.errstate(divide="ignore"):
        log_rest = (n - k) * math.log1p(-share) if share < 1 else np.where(k == n, 0.0, -np.inf)
    log_pmf = gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1) + k * math.log(share)
    # Of k prompts with a loss of either sign at least this many are gains.
    least = np.maximum(np.ceil((k - highest[k]) / 2), 0)
    enough = np.where(least == 0, 1.0, 0.0)
    at = (least > 0) & (least <= k)
    gained = (share - limit) / 2
    enough[at] = betainc(least[at], k[at] - least[at] + 1, gained / share)
    return float((np.exp(log_pmf + log_rest) * enough).sum() + tail)
