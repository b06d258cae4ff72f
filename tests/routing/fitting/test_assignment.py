"""The best fixed assignment of groups to models, by hand, and beside a router."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tests.routing.labels import outcomes, specialists
from tests.routing.minimal_scorer import content

from pliant.routing import router_file
from pliant.routing.fitting.assignment import assigned
from pliant.routing.fitting.evaluate import measure
from pliant.routing.outcomes import Outcomes
from pliant.routing.scorers import Predictions
from pliant.routing.scorers.baselines import Group


def test_at_one_price_each_group_goes_to_the_model_that_is_likelier_right() -> None:
    train, test = specialists(1000, 0), specialists(400, 1)
    by_group = Group().fit(train).predict(test.prompts, test.groups)
    kinds = sorted(set(train.groups or ()))
    best = np.array([kinds.index(group) % 2 for group in test.groups or ()])
    right = assigned(by_group, test, 1.0, (1.0, 1.0))
    assert (right == test.right[np.arange(400), best]).all()


def test_a_budget_between_two_assignments_is_met_by_mixing_them() -> None:
    """Two groups, of which the large model helps one twice as much as the other."""
    groups = ("much",) * 50 + ("little",) * 50
    right = np.array([[0.0, 0.8]] * 50 + [[0.0, 0.4]] * 50)
    labels = Outcomes(
        tuple(map(str, range(100))), ("s", "l"), right, np.tile([0.0, 1.0], (100, 1)), groups
    )
    by_group = Predictions(right, right - right[:, :1])
    for budget, quality in ((0, 0), (0.25, 0.2), (0.5, 0.4), (0.75, 0.5), (1, 0.6), (9, 0.6)):
        got = assigned(by_group, labels, budget, (0.0, 1.0)).mean()
        assert got == pytest.approx(quality), budget


def test_the_verdict_names_it_and_says_that_it_knows_the_group() -> None:
    train, test = specialists(1000, 0), specialists(1000, 1).by_quality()
    train = train.of_models(test.models)
    names = ("nano-s", "nano-l")
    train, test = replace(train, models=names), replace(test, models=names)
    file = router_file.make(
        **content(
            models=[{"name": name, "backend": name, "cost": 1.0} for name in names],
            threshold={"on": "worth", "value": 0, "sentence": "the likelier"},
            default="nano-l",
        )
    )
    by_group = Group().fit(train).predict(test.prompts, test.groups)
    perfect = Predictions(test.right, test.right - test.right[:, :1])
    ahead = measure(file, perfect, test, {"group": by_group}).verdict
    assert ahead is not None and ahead.over_groups is not None and ahead.same_price
    assert ahead.over_groups.low > 0 and "which knows the group of every prompt" in ahead.notes[0]
    points = 100 * (test.right.max(axis=1).mean() - test.strong.mean())
    more = f"Answers {points:.1f} points more prompts right than always asking nano-l"
    assert str(ahead).startswith(f"{more}, at the same cost; a random choice")
    tied = measure(file, by_group, test, {"group": by_group}).verdict
    assert tied is not None and tied.over_groups is not None and tied.over_groups.value == 0
    without = measure(file, perfect, replace(test, groups=None), {"group": by_group}).verdict
    assert without is not None and without.over_groups is None
    worse = measure(file, Predictions(None, np.zeros((1000, 2))), test, {}).verdict
    assert worse is not None and not worse.pays and worse.saved == 0
    assert "which costs no more" in str(worse) and "Always ask nano-l" in str(worse)


def test_a_router_between_two_prices_is_compared_at_its_own_cost() -> None:
    train, test = outcomes(2000, 0), outcomes(1000, 1)
    by_group = Group().fit(train).predict(test.prompts, test.groups)
    file = router_file.make(
        **content(
            models=[
                {"name": "model-0", "backend": "nano-s", "cost": 0.0},
                {"name": "model-1", "backend": "nano-l", "cost": 1.0},
            ],
            default="model-1",
        )
    )
    evaluation = measure(file, by_group, test, {"group": by_group})
    assert evaluation.verdict is not None and evaluation.verdict.over_groups is not None
    assert abs(evaluation.verdict.over_groups.value) < 0.01
