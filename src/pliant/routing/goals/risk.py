"""Statistical tests that a promise holds for new prompts, and not only for the calibration split.

A prompt is a loss where the strongest model is right and the router's answer is not, and a gain
where it is the other way round. `proved(counts, limit, worth, delta)` is true only if it is proved
that among the counted prompts of the population

    share of losses - worth * share of gains < limit

Where that is not so the result is true with a probability of at most delta, for any number of
prompts and any population.

The order of the possible results, from what speaks most for the router to what speaks least, is
that of a score test, the distance from the limit in standard errors, with k losses and gains:

    z = (n * limit - losses + worth * gains) / sqrt(k - n * limit^2 + 3)

But the normal distribution holds for large n alone. The chance of as high a z or a higher one is
summed exactly instead, over k (binomial) and the gains among these k (binomial too). At the limit
one number of the population stays free, the share of gains. It is in the Clopper-Pearson interval
of the observed gains, except for a hundredth of delta, and the highest chance in this interval
counts, with the rest of delta (Berger and Boos). A population beyond the limit has more losses and
passes less often.

Grades between 0 and 1 (several samples, several wordings) are rounded at random to 0 or 1 so that
their mean stays what it is: the test is then as exact, and the rounding adds to the variance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from pliant.stats import Floats

Flags = NDArray[np.bool_]

# Up to here a split without losses and gains is the best there can be, and so proved as soon as
# (1 - limit)^n is below delta: for .02 and .05 with 149 prompts. A value of 4
# would need 151 prompts, and one of 6 needs 180.
EXTRA = 3.0
_OUTSIDE = 0.01  # of delta: 5 % sends .1 point more calls, on 200 draws of 660 MMLU labels
_SHARES = 11  # about .7 standard errors apart
_REACH = 6.0  # standard errors of k that are summed: the rest is below 1e-8


@dataclass(frozen=True)
class Counts:
    """How many prompts count, and how many of these the router loses and gains."""

    prompts: int
    losses: int
    gains: int

    @classmethod
    def of(cls, strong: Flags, routed: Flags, either: bool = False) -> Counts:
        """From whether each answer is right; with `either`, prompts on which no model is right do
        not count."""
        prompts = np.count_nonzero(strong | routed) if either else len(strong)
        losses, gains = np.count_nonzero(strong & ~routed), np.count_nonzero(routed & ~strong)
        return cls(int(prompts), int(losses), int(gains))

    def margin(self, limit: float, worth: float) -> float:
        """How many losses fewer there are than the limit permits."""
        return self.prompts * limit - self.losses + worth * self.gains

    def variance(self, limit: float) -> float:
        """Of the margin, at the limit."""
        return max(self.losses + self.gains - self.prompts * limit**2, 0.0)


def proved(counts: Counts, limit: float, worth: float, delta: float) -> bool:
    """Whether the share of losses less `worth` times that of gains is proved to be below `limit`,
    with a probability of at most delta that it is not."""
    if limit >= 1:  # which no share exceeds
        return True
    return counts.losses <= most_losses(counts.prompts, counts.gains, limit, worth, delta)


@lru_cache(maxsize=2**14)
def most_losses(n: int, gains: int, limit: float, worth: float, delta: float) -> int:
    """The most losses that are a proof beside these gains; -1 if even none are too many."""
    from scipy.special import ndtri

    def enough(losses: int) -> bool:
        p = p_value(Counts(n, losses, gains), limit, worth, delta * _OUTSIDE)
        return p <= delta * (1 - _OUTSIDE)

    # By the normal distribution, which is rarely 2 beside the exact result; z solves to losses.
    z, most = max(0.0, -float(ndtri(delta))), n * limit + worth * gains
    error = math.sqrt(max(0.0, z**2 / 4 + most + gains - n * limit**2 + EXTRA))
    losses = max(-1, math.floor(most + z**2 / 2 - z * error))
    while enough(losses + 1):
        losses += 1
    while losses >= 0 and not enough(losses):
        losses -= 1
    return losses


def p_value(counts: Counts, limit: float, worth: float, outside: float) -> float:
    """The chance of such counts or better ones, of the population at the limit that makes them the
    likeliest; its share of gains is in their interval at level 1 - outside."""
    from scipy.special import betainc, gammaln

    n = counts.prompts
    z = counts.margin(limit, worth) / math.sqrt(counts.variance(limit) + EXTRA)
    if z <= 0:
        return 1.0
    gained = _plausible(n, counts.gains, (1 - limit) / (1 + worth), outside)[:, None]
    share = np.clip(limit + (1 + worth) * gained, 1e-12, 1 - 1e-12)  # of losses and gains
    reach = _REACH * float(np.sqrt(n * share * (1 - share)).max()) + 16
    first, last = n * float(share.min()) - reach, n * float(share.max()) + reach
    k = np.arange(max(0, math.floor(first)), min(n, math.ceil(last)) + 1)
    log_pmf = gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)
    log_pmf = log_pmf + k * np.log(share) + (n - k) * np.log1p(-share)
    # Of k losses and gains at least this many are gains.
    error = np.sqrt(np.maximum(k - n * limit**2, 0) + EXTRA)
    least = np.ceil((k - n * limit + z * error) / (1 + worth) - 1e-9)
    enough = np.where(least <= 0, 1.0, np.zeros_like(log_pmf))
    some = (least > 0) & (least <= k)
    enough[:, some] = betainc(least[some], (k - least + 1)[some], gained / share)
    return float((np.exp(log_pmf) * enough).sum(axis=1).max())


def rounded(right: Floats, seed: int = 0) -> Flags:
    """Grades as right or wrong with the same mean in the population, by rounding at random.

    One draw for each row, whatever the grades: equal grades of two models are rounded alike.
    """
    return np.asarray(np.random.default_rng(seed).random(len(right)) < right)


def _plausible(n: int, count: int, highest: float, outside: float) -> Floats:
    """Shares over the Clopper-Pearson interval of `count` in n, up to the highest."""
    from scipy.special import betaincinv

    low = betaincinv(count, n - count + 1, outside / 2) if count else 0.0
    high = betaincinv(count + 1, n - count, 1 - outside / 2) if count < n else 1.0
    ends = np.sqrt(np.minimum([low, high], highest))
    return np.asarray(np.linspace(ends[0], ends[1], _SHARES) ** 2)
