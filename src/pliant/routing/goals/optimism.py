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
    inside, outside = _counts(swept, seed)
    own, most = inside @ routed, inside @ strong
    others, most_of_others = outside @ routed, outside @ strong
    everywhere, rows = routed.mean(axis=0), np.arange(len(inside))
    for step in range(int(np.ceil(amount * _FINE - 1e-9)), int(_HIGHEST * _FINE) + 1):
        target = step / _FINE
        meets = own >= (target * most)[:, None] - 1e-12
        meets[:, -1] |= ~meets.any(axis=1)  # all to the strong model
        first = meets.argmax(axis=1)
        above_others = (others[rows, first] - amount * most_of_others).mean()
        above_all = everywhere[first].mean() - amount * strong.mean()
        if above_others + above_all >= -1e-12:
            return max(target, amount)
    return float("inf")


def _qualities(swept: Sweep) -> Floats:
    """(n, thresholds) whether each prompt is answered right, from few calls to many."""
    values, rows = swept.steps.values, np.arange(len(swept.outcomes))
    picked = np.unique(np.round(np.linspace(0, len(values) - 1, _THRESHOLDS)).astype(np.int64))
    columns = [swept.outcomes.right[rows, swept.choose(float(value))] for value in values[picked]]
    return np.stack(columns, axis=1)


def _counts(swept: Sweep, seed: int) -> tuple[Floats, Floats]:
    """(resamples, n) how often a row is drawn, and whether it is not drawn; rows sum to 1.

    The wordings of a question are drawn together.
    """
    n, questions = len(swept.outcomes), swept.outcomes.questions
    units = np.arange(n) if questions is None else np.unique(questions, return_inverse=True)[1]
    many = int(units.max()) + 1
    drawn = np.random.default_rng(seed).integers(0, many, (_RESAMPLES, many))
    drawn += many * np.arange(_RESAMPLES)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=_RESAMPLES * many).reshape(_RESAMPLES, many)
    inside = counts[:, units].astype(np.float64)
    outside = (inside == 0).astype(np.float64)
    outside[~outside.any(axis=1)] = 1.0  # a resample of few rows may hold all of them
    return _shares(inside), _shares(outside)


def _shares(counts: Floats) -> Floats:
    return counts / counts.sum(axis=1, keepdims=True)
