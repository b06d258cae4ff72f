"""A threshold that just meets a quality on the labels it is chosen on misses it on other prompts.

It is the first of many that passes, so chance helped it. `internal_target` is the higher share of
the strong model's quality to choose with, so that the mean quality on other prompts is at the
target or above. It comes from 200 resamples: on each a threshold is chosen, and measured on

- all rows, which understates the optimism, because the resample holds most of them, and
- the rows that the resample lacks, which overstates it: what one has too much, the other lacks.

The mean of the two is what counts (benchmarks/promises.py measures it beside the uncorrected one).
"""

from __future__ import annotations

import numpy as np

from pliant.routing.decision_rule import Sweep
from pliant.stats import Floats

_RESAMPLES, _THRESHOLDS = 200, 200
_FINE = 400  # internal targets are multiples of 1 / 400 of the strong model's quality
_HIGHEST = 1.1


def internal_target(amount: float, swept: Sweep, seed: int = 0) -> float:
    """The share of the strong model's quality to choose with; inf if no share is high enough."""
    routed, strong = _qualities(swept), swept.outcomes.strong
    inside, outside, everywhere = _counts(swept, seed)
    at = np.arange(len(inside))
    own = inside @ routed, inside @ strong
    others = [(counts @ routed, counts @ strong) for counts in (outside, everywhere)]
    for step in range(int(np.ceil(amount * _FINE - 1e-9)), int(_HIGHEST * _FINE) + 1):
        target = step / _FINE
        meets = own[0] >= (target * own[1])[:, None] - 1e-12
        meets[:, -1] |= ~meets.any(axis=1)  # all to the strong model
        first = meets.argmax(axis=1)
        above = [(quality[at, first] - amount * most).mean() for quality, most in others]
        if np.mean(above) >= -1e-12:
            return max(target, amount)
    return float("inf")


def _qualities(swept: Sweep) -> Floats:
    """(n, thresholds) whether each prompt is answered right, from few calls to many."""
    values, rows = swept.steps.values, np.arange(len(swept.outcomes))
    picked = np.unique(np.round(np.linspace(0, len(values) - 1, _THRESHOLDS)).astype(np.int64))
    columns = [swept.outcomes.right[rows, swept.choose(float(value))] for value in values[picked]]
    return np.stack(columns, axis=1)


def _counts(swept: Sweep, seed: int) -> tuple[Floats, Floats, Floats]:
    """(resamples, n) each: how often a row is drawn, is not drawn, and is there; rows sum to 1.

    The wordings of a question are drawn together.
    """
    n, questions = len(swept.outcomes), swept.outcomes.questions
    units = np.arange(n) if questions is None else np.unique(questions, return_inverse=True)[1]
    many = int(units.max()) + 1
    drawn = np.random.default_rng(seed).multinomial(many, np.full(many, 1 / many), _RESAMPLES)
    counts = drawn[:, units].astype(np.float64)
    missing = (counts == 0).astype(np.float64)
    missing[~missing.any(axis=1)] = 1.0  # a resample of few rows may hold all of them
    everywhere = np.full_like(counts, 1 / n)
    return _shares(counts), _shares(missing), everywhere


def _shares(counts: Floats) -> Floats:
    return counts / counts.sum(axis=1, keepdims=True)
