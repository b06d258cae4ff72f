"""Missing grades are filled in for training: known ones stay, and predictions use what is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from tests.routing.labels import outcomes

from pliant.routing.outcomes import Outcomes
from pliant.routing.scorers import make
from pliant.routing.scorers.imputing import imputed


def without(table: Outcomes, model: int, share: float, seed: int = 0) -> Outcomes:
    right = table.right.copy()
    right[np.random.default_rng(seed).random(len(table)) < share, model] = np.nan
    return replace(table, right=right)


def test_known_grades_stay_and_missing_ones_are_predicted() -> None:
    truth = outcomes(600, 0)
    partial = without(truth, 1, 0.4)
    full, missing = imputed(partial), np.isnan(partial.right)
    assert full.complete.all() and np.isfinite(full.cost).all()
    assert (full.right[~missing] == truth.right[~missing]).all()
    predicted, true = full.right[:, 1][missing[:, 1]], truth.right[:, 1][missing[:, 1]]
    constant = truth.right[:, 1][~missing[:, 1]].mean()
    assert np.mean((predicted - true) ** 2) < 0.8 * np.mean((constant - true) ** 2)


def test_a_complete_table_is_the_same() -> None:
    table = outcomes(50, 0)
    assert imputed(table) is table


def test_the_other_models_grades_are_used() -> None:
    """Two models that are right on the same prompts, which the text does not tell apart."""
    coin = np.random.default_rng(0).integers(0, 2, 300).astype(float)
    prompts = tuple(f"flip {chr(97 + i % 26)}" for i in range(300))
    table = Outcomes(prompts, ("a", "b"), np.stack([coin, coin], axis=1), np.ones((300, 2)))
    partial = without(table, 0, 0.5)
    at = np.isnan(partial.right[:, 0])
    assert ((imputed(partial).right[at, 0] > 0.5) == (coin[at] > 0.5)).all()


def test_every_scorer_can_be_fitted_on_it_and_prompts_of_no_model_are_left_out() -> None:
    partial = without(without(outcomes(300, 0, models=3), 2, 0.5), 0, 0.5, seed=1)
    nothing = partial.right.copy()
    nothing[:7] = np.nan
    full = imputed(replace(partial, right=nothing))
    assert len(full) <= 293 and full.complete.all()
    for kind in ("length", "group", "tfidf", "knn", "text"):
        scorer = make(kind).fit(full)
        scorer.predict(full.asked, full.groups).check(full, kind)
