"""The cross-entropy method: sample candidates, keep the best, sample around them, and so on.

    result = search(lambda candidates: Scores(...), size=3)
    result.best

Which candidates are best depends on their values alone, not on their order: candidates that tie at
the border of the elite share its last places.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pliant.errors import InvalidInput, check_whole, named_settings
from pliant.stats import Floats, as_json

DIGITS = 6
"""Values that differ less than 10^-6 tie: batches of another size round otherwise."""


@named_settings
@dataclass(frozen=True, kw_only=True)
class CEMConfig:
    """How the cross-entropy method searches."""

    population: int = 32
    """Candidates in each round."""
    iterations: int = 12
    """Rounds."""
    elite_share: float = 0.2
    """The share of the candidates that the next round samples around."""
    std: float = 0.5
    """Of the first round's candidates around their mean."""
    least_std: float = 0.05
    """No round samples closer together, so that the search does not end early."""
    l1: float = 0.01
    """What a coefficient of 1 costs: experts that help little stay out, and none is clamped."""
    seed: int = 0
    """Of the samples."""

    def __post_init__(self) -> None:
        check_whole("population", self.population, 2)
        check_whole("iterations", self.iterations, 1)
        check_whole("seed", self.seed, 0)
        if not 0 < self.elite_share <= 1:
            raise InvalidInput(f"elite_share = {self.elite_share}: give a share above 0, up to 1")
        for name in ("std", "least_std", "l1"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InvalidInput(f"{name} = {getattr(self, name)}: give a number, 0 or more")


@dataclass(frozen=True, eq=False)
class Scores:
    """How good candidates are."""

    values: Floats
    """(candidates,) more is better."""
    tie_breaks: Floats | None = None
    """Decides between candidates of the same value, such as rewards of 0 and 1 often have."""


@dataclass(frozen=True)
class CEMResult:
    """The best candidate of a search."""

    best: tuple[float, ...]
    value: float
    """Its value, without the penalty on its size."""
    start_value: float
    """Of the candidate 0: for mixtures of experts, the base."""
    history: tuple[float, ...]
    """The value of the best candidate so far, after each round; penalised, it never falls."""
    evaluations: int

    def as_dict(self) -> dict[str, Any]:
        return dict(as_json(self))

    def __str__(self) -> str:
        return (
            f"the best of {self.evaluations:,} candidates has {self.value:.4f}, and 0 has "
            f"{self.start_value:.4f}"
        )


def search(
    score: Callable[[Floats], Scores],
    size: int,
    config: CEMConfig = CEMConfig(),
    start: Sequence[float] | None = None,
    known: Sequence[Sequence[float]] = (),
    groups: int = 1,
) -> CEMResult:
    """Maximise `score`, a function of (candidates, size) numbers.

    The first round holds 0, the `start` around which it samples, and what is `known` to be good;
    later ones hold their mean. `groups` divides the penalty: 4 blocks of coefficients cost as much
    as one that is the same everywhere.
    """
    generator = np.random.default_rng(config.seed)
    mean = np.zeros(size) if start is None else np.asarray(start, dtype=np.float64)
    if mean.shape != (size,):
        raise InvalidInput(f"start has {mean.size} numbers, and a candidate has {size}")
    std = np.full(size, config.std)
    fixed = [np.zeros(size), mean, *(np.asarray(each, dtype=np.float64) for each in known)]
    best: tuple[tuple[float, float, float], Floats, float] | None = None
    history: list[float] = []
    evaluations, value_of_zero = 0, float("nan")
    for _ in range(config.iterations):
        sampled = generator.normal(mean, std, (max(2, config.population - len(fixed)), size))
        candidates = np.concatenate([np.stack(fixed), sampled])
        scores = score(candidates)
        size_cost = config.l1 * np.abs(candidates).sum(1) / groups
        first, second = ranks(scores, size_cost)
        if not history:
            value_of_zero = float(scores.values[0])
        evaluations += len(candidates)
        top = max(range(len(candidates)), key=lambda i: (first[i], second[i], -size_cost[i]))
        key = (float(first[top]), float(second[top]), -float(size_cost[top]))
        if best is None or key > best[0]:
            best = (key, candidates[top], float(scores.values[top]))
        history.append(best[2])
        weight = elite_weights(first, second, round(config.elite_share * len(candidates)))
        # Around the old mean, so that the search widens while it moves on.
        spread = np.average((candidates - mean) ** 2, axis=0, weights=weight)
        mean = np.average(candidates, axis=0, weights=weight)
        std = np.maximum(np.sqrt(spread), config.least_std)
        fixed = [mean]
    assert best is not None
    numbers = tuple(map(float, best[1]))
    return CEMResult(numbers, best[2], value_of_zero, tuple(history), evaluations)


def ranks(scores: Scores, size_cost: Floats) -> tuple[Floats, Floats]:
    """What candidates are compared by first, and what decides between equals.

    The penalty is part of the last of them: rewards stay exact, and likelihoods are penalised.
    """
    values = _rounded(scores.values)
    if scores.tie_breaks is None:
        return _rounded(scores.values - size_cost), np.zeros_like(values)
    return values, _rounded(scores.tie_breaks - size_cost)


def _rounded(values: Floats) -> Floats:
    """What is no number is worst."""
    return np.where(np.isnan(values), -np.inf, values).round(DIGITS)


def elite_weights(first: Floats, second: Floats, count: int) -> Floats:
    """The weight of each candidate in the elite: 1 for the best, and for those that tie at its
    border an equal share of the places that are left; the weights sum to `count`."""
    count = min(max(1, count), len(first))
    order = np.lexsort((second, first))[::-1]
    border = order[count - 1]
    ties = (first == first[border]) & (second == second[border])
    better = (first > first[border]) | ((first == first[border]) & (second > second[border]))
    weight = better.astype(np.float64)
    weight[ties] = (count - better.sum()) / ties.sum()
    return weight
