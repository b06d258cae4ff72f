"""Statistical tests that a promise holds for new prompts, and not only for the calibration split.

The loss of a prompt lies in [-1, 1]: the quality of the strong model less that of the router.
`proves_below(losses, limit, delta)` is true only if the mean loss of the population is proved to
be below `limit`: where it is not, the result is true with a probability of at most delta, for any
number of prompts and any population. There are two tests:

- **Losses of -1, 0 and 1** (labels that are right or wrong) and at least _ENOUGH prompts to be lost
  at the limit: an exact test. Let d be the sum of the
  losses and s the share of prompts with a loss of either sign. Of all populations with a mean of at
  least the limit and a given s, the sum is the most likely to be as low as d where the mean is the
  limit; its probability is that of a trinomial. s is unknown: with probability 1 - delta/10 it lies
  between the limits of Clopper and Pearson, an interval that is divided into cells. In each cell
  its lowest share of losses and highest share of gains bound the probability. The largest of these
  plus delta/10 may not exceed delta (Berger and Boos).
- **Otherwise**: a bet (Waudby-Smith and Ramdas). A stake of 1 is played through the prompts
  in random order, each round multiplying it by 1 + bet * (limit - loss), the bet chosen from the
  rounds before. If the mean is at least the limit, this is a supermartingale, and by Ville's
  inequality ever reaches 1 / delta with a chance of at most delta.
"""

from __future__ import annotations

import math

import numpy as np

from pliant.stats import Floats

_CELLS = 24
# benchmarks/risk_promise.py: with 10 the bet saves more calls, with 25 the exact test does.
_ENOUGH = 20
_TAIL = 1e-9  # of the number of prompts with a loss; counted as if all of it were below


def proves_below(losses: Floats, limit: float, delta: float, seed: int = 0) -> bool:
    """Whether the mean of the losses' population is proved to be below the limit."""
    if np.isin(losses, (-1, 0, 1)).all() and _ENOUGH <= limit * len(losses) < len(losses):
        lost, gained = int((losses > 0).sum()), int((losses < 0).sum())
        return exact_p(lost, gained, len(losses), limit, delta / 10, stop_above=delta) <= delta
    order = np.random.default_rng(seed).permutation(len(losses))
    return highest_stake(losses[order], limit, delta) >= math.log(1 / delta)


def exact_p(
    lost: int, gained: int, n: int, limit: float, aside: float, stop_above: float = 1.0
) -> float:
    """The largest probability of a sum as low as lost - gained, plus the part set `aside`.

    Ends early, with a value above `stop_above`, once that is exceeded.
    """
    low, high = _between(lost + gained, n, aside)
    if high < limit:  # a mean of the limit needs that many losses
        return aside
    edges = np.linspace(max(low, limit), high, _CELLS + 1)
    worst_lost, worst_gained = (edges[:-1] + limit) / 2, (edges[1:] - limit) / 2
    if lost - gained >= n * limit:  # no evidence at all, and expensive to sum
        return 1.0
    bound = _chernoff(lost - gained, n, worst_lost, worst_gained)
    if bound.max() + aside <= stop_above < 1:  # true of the sum as well, which is smaller
        return float(bound.max() + aside)
    largest = 0.0
    for p_lost, p_gained in sorted(zip(worst_lost, worst_gained, strict=True), key=_spread):
        largest = max(largest, _sum_at_most(lost - gained, n, float(p_lost), float(p_gained)))
        if largest + aside > stop_above:
            break
    return min(1.0, largest + aside)


def highest_stake(losses: Floats, limit: float, delta: float) -> float:
    """The logarithm of the highest value that the stake reached."""
    n = len(losses)
    rounds = np.arange(1, n + 1)
    mean = np.cumsum(losses) / (rounds + 1)
    spread = (0.25 + np.cumsum((losses - mean) ** 2)) / (rounds + 1)
    before = np.concatenate([[0.25], spread[:-1]])
    # Large enough for a proof within n rounds, and never so large that one round can lose it all.
    bet = np.minimum(np.sqrt(2 * math.log(1 / delta) / (n * before)), 0.75 / (1 - limit))
    return float(np.cumsum(np.log1p(bet * (limit - losses))).max())


def _between(count: int, n: int, aside: float) -> tuple[float, float]:
    """The limits of Clopper and Pearson for a share, each missed with probability aside / 2."""
    from scipy.special import betaincinv

    low = 0.0 if count == 0 else float(betaincinv(count, n - count + 1, aside / 2))
    high = 1.0 if count == n else float(betaincinv(count + 1, n - count, 1 - aside / 2))
    return low, high


def _chernoff(d: int, n: int, p_lost: Floats, p_gained: Floats) -> Floats:
    """A bound of the probability that the sum is at most d: E exp(t (d - sum)), for the best t."""
    t = np.geomspace(1e-3, 3, 60)[:, None]
    mean = 1 + p_lost * np.expm1(-t) + p_gained * np.expm1(t)
    return np.exp(np.minimum(n * np.log(mean) + t * d, 0).min(axis=0))


def _sum_at_most(d: int, n: int, p_lost: float, p_gained: float) -> float:
    """The probability that losses less gains of n prompts are at most d, at most _TAIL too high."""
    from scipy.special import betainc, gammaln

    share = p_lost + p_gained
    reach = math.sqrt(n * math.log(2 / _TAIL) / 2)  # Hoeffding
    k = np.arange(max(0, math.floor(n * share - reach)), min(n, math.ceil(n * share + reach)) + 1)
    with np.errstate(divide="ignore"):
        log_rest = (n - k) * math.log1p(-share) if share < 1 else np.where(k == n, 0.0, -np.inf)
        log_pmf = gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1) + k * math.log(share)
    # Of k prompts with a loss of either sign at least this many are gains.
    least = np.maximum(np.ceil((k - d) / 2), 0)
    possible = least <= k
    enough = np.where(least == 0, 1.0, 0.0)
    at = possible & (least > 0)
    enough[at] = betainc(least[at], k[at] - least[at] + 1, p_gained / share)
    return float((np.exp(log_pmf + log_rest) * enough).sum() + _TAIL)


def _spread(shares: tuple[float, float]) -> float:
    """The widest first, because it is the likeliest to be the largest."""
    return -(shares[0] + shares[1])
