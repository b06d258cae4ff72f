"""Uncertainty of a measurement: bootstrap bands, paired differences, calibration errors.

    band = bootstrap(lambda rows: float(quality[rows].mean()), n=len(quality))
    paired(statistic_of_a, statistic_of_b, n)          # the difference, on the same resamples

A resample draws n of the n prompts with replacement, or whole clusters of them. A statistic is a
function of the drawn indices. If it needs only how often each prompt was drawn, `bootstrap_counts`
passes it the counts of many resamples at once, which is many times as fast.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import lru_cache
from itertools import islice
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pliant.errors import InvalidInput

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]
Statistic = Callable[[Indices], float]
CountStatistic = Callable[[Floats], Floats]
"""(resamples, n) counts of draws -> (resamples,) values."""

_DRAWS_IN_MEMORY = 2_000_000


def sigmoid(x: ArrayLike) -> NDArray[Any]:
    """1 / (1 + e^-x) in the precision of x, without an overflow."""
    p: NDArray[Any] = np.exp(-np.logaddexp(0.0, -np.asarray(x)))
    return p


def logit(p: ArrayLike, margin: float) -> Floats:
    """log(p / (1 - p)), with p at least `margin` away from 0 and 1, which have no logit."""
    inside = np.clip(np.asarray(p, dtype=np.float64), margin, 1 - margin)
    return np.log(inside / (1 - inside))


_LINEAR = 0.95  # up to here `as_difference` changes nothing


def as_difference(x: ArrayLike) -> NDArray[Any]:
    """Numbers as differences of two probabilities: those beyond .95 are pressed together before 1
    (and -1), in their order. A linear fit of a difference predicts beyond 1 where it is sure."""
    values = np.asarray(x)
    beyond = np.maximum(np.abs(values) - _LINEAR, 0) / (1 - _LINEAR)
    pressed: NDArray[Any] = np.sign(values) * (_LINEAR + (1 - _LINEAR) * beyond / (1 + beyond))
    return np.where(beyond > 0, pressed, values)


@dataclass(frozen=True)
class Band:
    """A value with its confidence interval over prompts drawn in the same way.

    The limits are percentiles of the statistic over resamples, widened to include the value, since
    all resamples of a biased statistic (a maximum, say) may lie on one side of it.
    """

    value: float
    low: float
    high: float
    level: float = 0.95

    def excludes(self, other: float) -> bool:
        """Whether `other` lies outside; False for an undefined band."""
        return other < self.low or other > self.high

    def as_dict(self) -> dict[str, Any]:
        """For JSON: undefined values are null."""
        return dict(as_json(self))

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def as_json(result: Any) -> Any:
    """A result for JSON, which has no NaN: undefined numbers are null, and arrays are lists."""
    if is_dataclass(result):
        return {field.name: as_json(getattr(result, field.name)) for field in fields(result)}
    if isinstance(result, Mapping):
        return {name: as_json(value) for name, value in result.items()}
    if isinstance(result, np.ndarray):
        result = result.tolist()
    if isinstance(result, (list, tuple)):
        return [as_json(value) for value in result]
    return None if isinstance(result, float) and not math.isfinite(result) else result


def from_json(kind: Any, content: Any) -> Any:
    """A value of this type from what `as_json` wrote; a null is NaN where None is no value."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is UnionType:
        return None if content is None else from_json(parts[0], content)
    if isinstance(kind, type) and is_dataclass(kind):
        hints = get_type_hints(kind)
        return kind(**{name: from_json(hints[name], value) for name, value in content.items()})
    if origin in (dict, Mapping):
        return {name: from_json(parts[1], value) for name, value in content.items()}
    if origin is tuple:
        kinds = parts[:1] * len(content) if parts[-1] is ... else parts
        return tuple(map(from_json, kinds, content))
    if origin is np.ndarray:
        return np.asarray(content, dtype=np.float64)
    return math.nan if kind is float and content is None else kind(content)


def bootstrap(
    statistic: Statistic,
    n: int,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    clusters: Sequence[Hashable] | None = None,
) -> Band:
    """The statistic of all n, with a band; draws whole `clusters`, if there are any."""
    values = [statistic(rows) for rows in draws(n, resamples, seed, clusters)]
    return percentiles(statistic(np.arange(n)), np.asarray(values), level)


def paired(a: Statistic, b: Statistic, n: int, **how: Any) -> Band:
    """The difference a - b, both on the same resamples of the prompts; `how` is `bootstrap`'s."""
    return bootstrap(lambda rows: a(rows) - b(rows), n, **how)


def bootstrap_counts(
    statistic: CountStatistic,
    n: int,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    clusters: Sequence[Hashable] | None = None,
) -> Band:
    """As `bootstrap`, with the same draws, for a statistic of how often each prompt was drawn."""
    values = count_values(statistic, n, resamples, seed, clusters)
    return percentiles(float(statistic(np.ones((1, n)))[0]), values, level)


def count_values(
    statistic: CountStatistic,
    n: int,
    resamples: int = 1000,
    seed: int = 0,
    clusters: Sequence[Hashable] | None = None,
) -> Floats:
    """The statistic of each resample; it may return more axes than the first."""
    if n * resamples <= _DRAWS_IN_MEMORY:
        names = None if clusters is None else tuple(clusters)
        return statistic(_all_counts(n, resamples, seed, names))
    each, values = _counts(n, resamples, seed, clusters), []
    while chunk := list(islice(each, max(1, _DRAWS_IN_MEMORY // n))):
        values.append(statistic(np.stack(chunk)))
    return np.concatenate(values)


@lru_cache(maxsize=4)
def _all_counts(n: int, resamples: int, seed: int, clusters: tuple[Hashable, ...] | None) -> Floats:
    """The counts of a small bootstrap: many statistics of one data set use the same ones."""
    counts = np.stack(list(_counts(n, resamples, seed, clusters)))
    counts.flags.writeable = False
    return counts


def _counts(
    n: int, resamples: int, seed: int, clusters: Sequence[Hashable] | None
) -> Iterator[Floats]:
    """How often each row is in each resample."""
    for rows in draws(n, resamples, seed, clusters):
        yield np.bincount(rows, minlength=n).astype(np.float64)


def draws(
    n: int, resamples: int, seed: int = 0, clusters: Sequence[Hashable] | None = None
) -> Iterator[Indices]:
    """The indices of each resample: n of n with replacement, or as many clusters as there are.

    With clusters a resample's size varies, as the sizes of the drawn clusters do.
    """
    if n < 1 or resamples < 1:
        raise InvalidInput(f"a bootstrap needs rows and resamples, not {n} and {resamples}")
    rng = np.random.default_rng(seed)
    if clusters is None:
        for _ in range(resamples):
            yield rng.integers(0, n, n)
        return
    if len(clusters) != n:
        raise InvalidInput(f"{len(clusters)} cluster names for {n} rows")
    members = _members(clusters)
    for _ in range(resamples):
        drawn = rng.integers(0, len(members), len(members))
        yield np.concatenate([members[i] for i in drawn])


def _members(clusters: Sequence[Hashable]) -> list[Indices]:
    rows: dict[Hashable, list[int]] = {}
    for i, name in enumerate(clusters):
        rows.setdefault(name, []).append(i)
    return [np.asarray(indices, dtype=np.int64) for indices in rows.values()]


def percentiles(value: float, resampled: Floats, level: float = 0.95) -> Band:
    """The band of a value by those of the resamples on which the statistic is defined."""
    if not 0 < level < 1:
        raise InvalidInput(f"level={level} must lie between 0 and 1, such as 0.95")
    defined = resampled[~np.isnan(resampled)]
    if math.isnan(value) or not len(defined):
        return Band(value, math.nan, math.nan, level)
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return Band(float(value), float(min(low, value)), float(max(high, value)), level)


# --- how good a predicted probability is ----------------------------------------------------------


def ece(p: ArrayLike, y: ArrayLike, bins: int = 15, debias: bool = True) -> float:
    """Expected calibration error: the mean over bins, by size, of |mean(y) - mean(p)|.

    Bins hold equally many points; points with the same p share a bin, so that the order of the rows
    does not matter. `y` is 0 or 1, or a share.

    A bin of n points has a gap even if p is calibrated: its mean of y has noise of variance
    v = var(y - p) / n, and |gap + noise| is larger than |gap| on average. `debias` subtracts that
    excess, for normal noise, from each bin (estimating its gap by sqrt(max(0, gap^2 - v))). About a
    quarter of a calibrated p's noise remains (5,000 points: .005 of .018); a gap as small as the
    noise is estimated a little low (.030 for .034), and a large one correctly. A result below 0
    counts as 0.
    """
    p, y = probabilities(p, y)
    number = _equal_mass(p, bins)
    size = np.bincount(number)
    size, bin_of = size[size > 0], np.unique(number, return_inverse=True)[1]
    residual = y - p
    gap = np.bincount(bin_of, residual) / size
    if not debias:
        return float(np.average(np.abs(gap), weights=size))
    spread = np.bincount(bin_of, (residual - gap[bin_of]) ** 2) / np.maximum(size - 1, 1)
    excess = _excess(np.abs(gap), spread / size)
    return max(0.0, float(np.average(np.abs(gap) - excess, weights=size)))


def brier(p: ArrayLike, y: ArrayLike) -> float:
    """The mean of (p - y)^2: 0 is perfect, p = 1/2 has .25."""
    p, y = probabilities(p, y)
    return float(np.mean((p - y) ** 2))


def brier_skill(p: ArrayLike, y: ArrayLike, base: float | None = None) -> float:
    """1 - Brier / Brier of a constant: how much better than always predicting `base`.

    `base` is the share of y in the split that the probability was fitted on; by default the share
    in y itself, the best of all constants. NaN if the constant is always right.
    """
    p, y = probabilities(p, y)
    constant = brier(np.full_like(p, y.mean() if base is None else base), y)
    return 1 - brier(p, y) / constant if constant > 0 else math.nan


def auc(score: ArrayLike, y: ArrayLike) -> float:
    """The probability that a positive scores above a negative; a tie counts half.

    A share y counts as y of a positive and 1 - y of a negative. NaN if there are none of either.
    """
    score, y = vectors(score, y)
    _, block = np.unique(score, return_inverse=True)
    positive, negative = np.bincount(block, y), np.bincount(block, 1 - y)
    below = np.cumsum(negative) - negative
    pairs = y.sum() * (1 - y).sum()
    return float((positive * (below + negative / 2)).sum() / pairs) if pairs > 0 else math.nan


def _equal_mass(p: Floats, bins: int) -> Indices:
    """The bin of each point: the bin of the middle of its block of equal values."""
    if bins < 1:
        raise InvalidInput(f"bins={bins} must be at least 1")
    _, block, count = np.unique(p, return_inverse=True, return_counts=True)
    middle = np.cumsum(count) - count / 2
    # At least two points a bin: a single one has no spread to estimate the noise from.
    bins = max(1, min(bins, len(p) // 2))
    return np.minimum((middle * bins / len(p)).astype(np.int64), bins - 1)[block]


def _excess(gap: Floats, variance: Floats) -> Floats:
    """E|g + noise| - g for normal noise, at g^2 = gap^2 - variance or 0."""
    noisy = variance > 0
    g = np.sqrt(np.maximum(0, gap**2 - variance))[noisy]
    s = np.sqrt(variance[noisy])
    inside = np.array([math.erf(x) for x in g / (s * math.sqrt(2))])
    excess = np.zeros_like(gap)
    excess[noisy] = s * math.sqrt(2 / math.pi) * np.exp(-((g / s) ** 2) / 2) + g * inside - g
    return excess


def probabilities(p: ArrayLike, y: ArrayLike) -> tuple[Floats, Floats]:
    """Two vectors of equal length with values in [0, 1]."""
    p, y = vectors(p, y)
    for name, values in (("p", p), ("y", y)):
        if not ((values >= 0) & (values <= 1)).all():
            raise InvalidInput(f"{name} has values outside [0, 1]: give probabilities or shares")
    return p, y


def vectors(a: ArrayLike, b: ArrayLike) -> tuple[Floats, Floats]:
    """Two vectors of equal length, without NaN."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.ndim != 1 or a.shape != b.shape or not len(a):
        raise InvalidInput(f"expected two vectors of equal length, not {a.shape} and {b.shape}")
    if np.isnan(a).any() or np.isnan(b).any():
        raise InvalidInput("NaN among the values")
    return a, b
