"""Whether a router pays: cost, scoring counted, and quality beside the strongest and chance."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from tests.routing.labels import outcomes
from tests.routing.minimal_scorer import content

from pliant.routing import router_file
from pliant.routing.fitting.evaluate import measure
from pliant.routing.fitting.evaluation import Evaluation
from pliant.routing.fitting.ladder import continued_by
from pliant.routing.fitting.verdict import Verdict
from pliant.routing.goals.goal import Goal
from pliant.routing.scorers import Predictions, make
from pliant.stats import Band

PAYS = Verdict(
    "large", 0.66, 1.0, "usd", Band(0.987, 0.97, 1.0), Band(0.072, 0.03, 0.11), shares=(0.6, 0.4)
)


def test_it_says_what_is_saved_at_which_quality_beside_chance() -> None:
    assert PAYS.pays and PAYS.saved == pytest.approx(0.34) and not PAYS.advice
    assert str(PAYS) == (
        "Saves 34.0 % of large's cost at 98.7 % of its quality; a random choice of as many calls "
        "has 7.2 points less quality."
    )
    chance = replace(PAYS, over_random=Band(0.01, -0.02, 0.04))
    assert chance.pays and "not shown to be better than a random choice" in str(chance)


def test_scoring_that_costs_more_than_it_saves_does_not_pay() -> None:
    dear = replace(PAYS, cost=1.106, scoring=0.446, reads_model=True)
    assert not dear.pays and dear.saved < 0
    assert str(dear).startswith("Saves nothing: 98.7 % of the quality of large alone, at 1.106")
    assert "--scorer text" in dear.advice
    everything = replace(PAYS, cost=1.0, of_quality=Band(1, 1, 1), shares=(0.0, 1.0))
    assert not everything.pays and "Every prompt goes to large" in str(everything)


def test_more_quality_pays_where_it_costs_no_more_or_was_shown() -> None:
    specialists = replace(PAYS, cost=1.0, of_quality=Band(1.2, 0.98, 1.4))
    assert specialists.pays and "20.0 % more quality than large alone" in str(specialists)
    assert not replace(specialists, cost=1.01).pays
    assert replace(specialists, cost=1.01, of_quality=Band(1.2, 1.1, 1.3)).pays
    free = replace(PAYS, cost=0.5, strongest_cost=0.0)
    assert not free.pays and "Always ask large" in str(free)


def test_it_does_not_pay_where_the_cheapest_model_alone_does_as_well() -> None:
    cheap = replace(PAYS, cheapest="small", cheapest_cost=0.3, cheapest_of_quality=0.9)
    assert cheap.pays and str(cheap) == str(PAYS)
    worse = replace(cheap, cost=0.303, of_quality=Band(0.0, 0.0, 0.0))
    assert not worse.pays and worse.saved > 0.69
    assert str(worse) == (
        "Is no better than small alone, which costs no more and has 90.0 % of large's quality; the "
        "router has 0.0 %. Always ask small, or give more labels."
    )
    assert replace(worse, of_quality=Band(0.91, 0.9, 0.92)).pays
    assert replace(worse, cost=0.29).pays, "scoring aside, it may be the cheaper"
    assert replace(worse, cheapest="large").headline.startswith("saves 69.7 %"), "no other model"


def test_a_goal_that_was_missed_is_mentioned() -> None:
    assert not replace(PAYS, goal_of_quality=0.98).notes, "not shown"
    (note,) = replace(PAYS, goal_of_quality=0.95, of_quality=Band(0.4, 0.3, 0.5)).notes
    assert "missed: 95.0 % of large's quality; it is 40.0 %, and at most 50.0 %." in note
    assert Goal.parse("2 % worse").share_of_quality(0.5) == pytest.approx(0.96)
    assert Goal.parse("95 % of the best model's quality").share_of_quality(0.5) == 0.95
    assert Goal.parse("30 % of calls").share_of_quality(0.5) is None
    assert Goal.of_sentence("one call is worth 2 right answers: set by hand") is None


def test_time_that_is_not_counted_is_mentioned() -> None:
    assert not PAYS.scoring_note
    note = replace(PAYS, scoring_ms=6.2).scoring_note
    assert "6.2 ms a prompt on the machine of the fit" in note
    continued = replace(PAYS, scoring_ms=6.2, unit="flops", reads_model=True)
    assert not continued.scoring_note, "every answer went on from it"
    assert not replace(PAYS, scoring_ms=6.2, scoring=6.2, unit="ms").scoring_note


def test_the_chosen_point_lies_on_the_router_s_own_curve_and_scoring_is_in_both() -> None:
    """With novel prompts, which go to the default whatever their gain."""
    labels = outcomes(1000, 3)
    rng = np.random.default_rng(0)
    gain = np.stack([np.zeros(1000), labels.gain / 3 + rng.normal(0, 0.2, 1000)], axis=1)
    for novel_to, default in enumerate(("nano-s", "nano-l")):
        scorer = {"kind": "letters", "cost": 0.25}
        file = router_file.make(**content(default=default, scorer=scorer))
        named = replace(labels, models=("nano-s", "nano-l"))
        evaluation = measure(file, Predictions(None, gain, rng.random(1000) < 0.1), named, {})
        curve, routed = evaluation.report.curve, evaluation.routed
        assert np.interp(routed.share, curve.share, curve.cost) == pytest.approx(routed.cost.value)
        on_it = np.interp(routed.share, curve.share, curve.quality)
        assert on_it == pytest.approx(routed.quality.value, abs=0.002), novel_to
        assert curve.cost[-1] == pytest.approx(1.25) and evaluation.strong_cost == 1
        verdict = evaluation.verdict
        assert verdict is not None and verdict.cost == routed.cost.value
        assert verdict.saved == pytest.approx(1 - routed.of_strong_cost.value)
        again = Evaluation.from_dict(json.loads(json.dumps(evaluation.as_dict(), allow_nan=False)))
        assert verdict.cheapest == "nano-s" and verdict.cheapest_cost == 0
        assert verdict.cheapest_of_quality == pytest.approx(
            labels.weak.mean() / labels.strong.mean()
        )
        assert verdict.goal_of_quality is None
        assert again.verdict == verdict and again.costs == evaluation.costs


def test_answers_that_continue_from_the_scorer_s_prefill_pay_nothing_for_it() -> None:
    local = {"small": "nano-s", "large": "nano-l"}
    assert continued_by(make("cpx", base="nano-s"), local) == "small"
    assert continued_by(make("cpx", base="nano-s"), {"large": "nano-l"}) is None
    assert continued_by(make("probe", base="nano-s"), local) is None
    labels = replace(outcomes(400, 3), models=("nano-s", "nano-l"))
    gain = np.stack([np.zeros(400), labels.gain / 2], axis=1)
    scorer = {"kind": "letters", "cost": 0.25, "continued_by": "nano-s"}
    file = router_file.make(**content(scorer=scorer))
    evaluation = measure(file, Predictions(None, gain), labels, {})
    share, cost = evaluation.routed.share, evaluation.routed.cost.value
    assert file.scoring == (0, 0.25) and cost == pytest.approx(1.25 * share)
    assert evaluation.report.curve.cost[0] == 0 and evaluation.report.curve.cost[-1] == 1.25
