"""Fill in the grades of models that were not asked, so that every scorer can be fitted on all rows.

train = imputed(train)      # for fitting alone: never for calibration, a threshold or a metric
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from pliant.linear import ridge
from pliant.routing.outcomes import Outcomes
from pliant.routing.scorers.features import Surface, Words
from pliant.routing.scorers.text import WAVES
from pliant.stats import Floats

_STRENGTH = 15.0
"""Among the strengths of the scorer `text`, which it would choose for some hundred labels."""
_GRADE, _GROUP = 3.0, 0.3**0.5
"""The weight of another model's grade, which is worth many words, and of a group."""


def imputed(outcomes: Outcomes, seed: int = 0) -> Outcomes:
    """The table with a prediction in place of each missing grade: ridge regression on the text, the
    group and the grades of the other models.

    A missing cost is the model's mean. Prompts that no model was asked are left out. See
    benchmarks/missing_labels.py for what the incomplete rows add to training on the complete ones.
    """
    missing = np.isnan(outcomes.right)
    if not missing.any():
        return outcomes
    if missing.all(axis=1).any():
        return imputed(outcomes.select(~missing.all(axis=1)), seed)
    right, text = outcomes.right.copy(), _text(outcomes, seed)
    for j in np.flatnonzero(missing.any(axis=0)):
        x, known = _with_grades(text, outcomes.right, int(j)), ~missing[:, j]
        if not known.any():
            right[:, j] = np.nanmean(outcomes.right)
            continue
        predict = ridge(x[known], outcomes.right[known][:, [j]], _STRENGTH)
        right[~known, j] = np.clip(predict(x[~known])[:, 0], 0.0, 1.0)
    means = np.nan_to_num([_mean(column) for column in outcomes.cost.T])
    return replace(outcomes, right=right, cost=np.where(missing, means, outcomes.cost))


def _text(outcomes: Outcomes, seed: int) -> Any:
    """(n, features) of the text and of the group."""
    from scipy.sparse import csr_matrix, hstack

    texts = outcomes.prompts
    surface = Surface.of(texts, WAVES, seed)(texts)
    x = hstack([Words().fit(texts)(texts), csr_matrix(surface)], format="csr")
    if outcomes.groups is None:
        return x
    names, at = np.unique(outcomes.groups, return_inverse=True)
    n = len(outcomes)
    columns = csr_matrix((np.full(n, _GROUP), (np.arange(n), at)), shape=(n, len(names)))
    return hstack([x, columns], format="csr")


def _with_grades(text: Any, right: Floats, model: int) -> Any:
    """With the grades of the other models, centred; a missing one counts as its mean."""
    from scipy.sparse import csr_matrix, hstack

    others = np.delete(right, model, axis=1)
    centred = np.stack([column - _mean(column) for column in others.T], axis=1)
    grades = csr_matrix(_GRADE * np.nan_to_num(centred))
    return hstack([text, grades], format="csr")


def _mean(values: Floats) -> float:
    """Of the known ones."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else np.nan
