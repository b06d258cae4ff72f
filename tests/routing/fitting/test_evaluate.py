"""What is said of a router on held-out prompts, held against what is so."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from tests.routing.labels import KINDS, outcomes
from tests.routing.minimal_scorer import content

from pliant.routing import router_file
from pliant.routing.fitting.evaluate import kept, measured
from pliant.routing.scorers import Predictions
from pliant.routing.scorers.controls import Group, Length

FILE = router_file.made(
    **content(
        unit="calls",
        models=[
            {"name": "model-0", "backend": "nano-s", "cost": 0.0},
            {"name": "model-1", "backend": "nano-l", "cost": 1.0},
        ],
        scorer={"kind": "group"},
        default="model-1",
    )
)


@pytest.fixture(scope="module")
def test():
    return outcomes(2000, 3)


@pytest.fixture(scope="module")
def found(test):
    group = Group().fit(outcomes(4000, 1))
    predicted = group.predict(test.prompts, test.groups)
    length = Length().fit(outcomes(4000, 1)).predict(test.prompts)
    return measured(FILE, predicted, test, {"length": length})


def test_the_threshold_does_what_is_said(found, test):
    strong = np.array(test.groups) == "times"  # the one kind with more than .2 to gain
    assert found.routed.share == pytest.approx(strong.mean())
    right = np.where(strong, test.strong, test.weak)
    assert found.routed.quality.value == pytest.approx(right.mean())
    assert found.routed.of_strong.value == pytest.approx(right.mean() / test.strong.mean())
    assert found.routed.cost.value == pytest.approx(strong.mean())
    assert found.routed.quality.low < right.mean() < found.routed.quality.high


def test_what_scoring_costs_is_counted(found, test):
    scored = FILE.model_copy(update={"scorer": FILE.scorer.model_copy(update={"cost": 0.25})})
    predicted = Group().fit(outcomes(4000, 1)).predict(test.prompts, test.groups)
    dearer = measured(scored, predicted, test, {})
    assert dearer.routed.cost.value == pytest.approx(found.routed.cost.value + 0.25)
    assert dearer.routed.of_strong_cost.value == pytest.approx(
        found.routed.of_strong_cost.value + 0.25
    )


def test_it_is_held_against_its_baselines(found):
    assert found.over["length"].low > 0.1
    assert found.metrics["apgr"].value - found.baselines["length"].metrics["apgr"].value == (
        pytest.approx(found.over["length"].value)
    )


def test_a_constant_is_calibrated_and_has_no_skill():
    y = np.tile([1.0, 0.0, 0.0, 0.0], 500)
    constant = kept("m", np.full(2000, 0.25), y)
    assert constant.ece == 0 and constant.skill == pytest.approx(0)
    wrong = kept("m", np.full(2000, 0.75), y)
    assert wrong.ece == pytest.approx(0.5, abs=0.01) and wrong.skill < 0
    assert sum(n for _, _, n in wrong.bins) == 2000


def test_probabilities_of_the_group_means_are_kept(found):
    small, _ = found.calibration
    chances = [KINDS[kind][0] for kind in KINDS]
    assert small.model == "model-0" and small.ece < 0.03 and small.skill > 0.4
    assert min(chances) - 0.05 < small.bins[0][0] < small.bins[-1][0] < max(chances) + 0.05


def test_the_histogram_counts_every_prompt_once(found, test):
    counted = sum(found.histogram["right"]) + sum(found.histogram["wrong"])
    assert counted == len(test)
    assert sum(found.histogram["right"]) == test.weak.sum()


def test_examples_lie_on_their_side(found):
    for side, some in found.examples.items():
        model = "model-0" if "cheap" in side else "model-1"
        assert some and all(example.chosen == model for example in some)
        assert all((example.gain > 0.2) == (model == "model-1") for example in some)


def test_novel_prompts_go_to_the_default():
    said = Predictions(None, np.zeros((3, 2)), np.array([True, False, True]))
    assert FILE.rule.choose(said.gain, said.novel).tolist() == [1, 0, 1]
    ignoring = FILE.model_copy(update={"novel": "ignore"})
    assert ignoring.rule.choose(said.gain, said.novel).tolist() == [0, 0, 0]


def test_paraphrases_that_go_apart_are_counted(test):
    some = test.select(range(4))
    gain = np.array([[0, 0.3], [0, 0.1], [0, 0.5], [0, 0.6]])

    def said(questions):
        asked = replace(some, questions=tuple(questions))
        return measured(FILE, Predictions(None, gain), asked, {}).paraphrases

    found = said("aabb")
    assert (found.questions, found.same_model) == (2, 0.5)
    assert found.spread == pytest.approx(0.15)
    assert said("abcd") is None


def test_wordings_of_a_question_are_drawn_together(test):
    """Each prompt twice is no more evidence than once."""
    some = test.select(range(200))
    twice = test.select([*range(200), *range(200)])
    gain = np.stack([np.zeros(200), some.gain + np.random.default_rng(0).normal(0, 1, 200)], axis=1)
    said, doubled = Predictions(None, gain), Predictions(None, np.tile(gain, (2, 1)))
    twice = replace(twice, questions=tuple(str(i) for i in range(200)) * 2)
    rest = {"length": Predictions(None, np.zeros((400, 2)))}
    once = measured(FILE, said, some, {})
    together = measured(FILE, doubled, twice, rest)

    def width(band):
        return band.high - band.low

    for pick in (lambda f: f.metrics["apgr"], lambda f: f.routed.quality, lambda f: f.routed.cost):
        assert width(pick(together)) == pytest.approx(width(pick(once)), rel=1e-6)
    assert width(together.over["length"]) == pytest.approx(width(once.metrics["apgr"]), rel=1e-6)


def test_it_is_json_without_nan(found):
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False))["scorer"] == "group"
