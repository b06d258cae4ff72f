"""What an evaluation states of a router on held-out prompts, compared with the truth."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from tests.routing.labels import KINDS, outcomes
from tests.routing.minimal_scorer import content

from pliant.errors import InvalidInput
from pliant.routing import router_file
from pliant.routing.fitting.evaluate import measure, reliability
from pliant.routing.fitting.evaluation import Evaluation
from pliant.routing.scorers import Predictions
from pliant.routing.scorers.baselines import Group, Length

FILE = router_file.make(
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
def evaluation(test):
    group = Group().fit(outcomes(4000, 1))
    predicted = group.predict(test.prompts, test.groups)
    length = Length().fit(outcomes(4000, 1)).predict(test.prompts)
    return measure(FILE, predicted, test, {"length": length})


def test_the_threshold_does_what_is_reported(evaluation, test):
    strong = np.array(test.groups) == "times"  # the one kind with more than .2 to gain
    assert evaluation.routed.share == pytest.approx(strong.mean())
    right = np.where(strong, test.strong, test.weak)
    assert evaluation.routed.quality.value == pytest.approx(right.mean())
    assert evaluation.routed.of_strong.value == pytest.approx(right.mean() / test.strong.mean())
    assert evaluation.routed.cost.value == pytest.approx(strong.mean())
    assert evaluation.routed.quality.low < right.mean() < evaluation.routed.quality.high


def test_what_scoring_costs_is_counted(evaluation, test):
    scored = FILE.model_copy(update={"scorer": FILE.scorer.model_copy(update={"cost": 0.25})})
    predicted = Group().fit(outcomes(4000, 1)).predict(test.prompts, test.groups)
    dearer = measure(scored, predicted, test, {})
    assert dearer.routed.cost.value == pytest.approx(evaluation.routed.cost.value + 0.25)
    assert dearer.routed.of_strong_cost.value == pytest.approx(
        evaluation.routed.of_strong_cost.value + 0.25
    )


def test_it_is_compared_with_its_baselines(evaluation):
    assert evaluation.over["length"].low > 0.1
    assert evaluation.metrics["apgr"].value - evaluation.baselines["length"].metrics[
        "apgr"
    ].value == (pytest.approx(evaluation.over["length"].value))


def test_a_constant_is_calibrated_and_has_no_skill():
    y = np.tile([1.0, 0.0, 0.0, 0.0], 500)
    constant = reliability("m", np.full(2000, 0.25), y)
    assert constant.ece == 0 and constant.skill == pytest.approx(0)
    wrong = reliability("m", np.full(2000, 0.75), y)
    assert wrong.ece == pytest.approx(0.5, abs=0.01) and wrong.skill < 0
    assert sum(n for _, _, n in wrong.bins) == 2000


def test_probabilities_of_the_group_means_are_calibrated(evaluation):
    small, _ = evaluation.calibration
    chances = [KINDS[kind][0] for kind in KINDS]
    assert small.model == "model-0" and small.ece < 0.03 and small.skill > 0.4
    assert min(chances) - 0.05 < small.bins[0][0] < small.bins[-1][0] < max(chances) + 0.05


def test_the_histogram_counts_every_prompt_once(evaluation, test):
    counted = sum(evaluation.histogram.right) + sum(evaluation.histogram.wrong)
    assert counted == len(test)
    assert sum(evaluation.histogram.right) == test.weak.sum()


def test_examples_lie_on_their_side(evaluation):
    for side, some in evaluation.examples.items():
        model = "model-0" if "cheap" in side else "model-1"
        assert some and all(example.chosen == model for example in some)
        assert all((example.gain > 0.2) == (model == "model-1") for example in some)


def test_novel_prompts_go_to_the_default():
    predictions = Predictions(None, np.zeros((3, 2)), np.array([True, False, True]))
    assert FILE.rule.choose(predictions.gain, predictions.novel).tolist() == [1, 0, 1]
    ignoring = FILE.model_copy(update={"novel": "ignore"})
    assert ignoring.rule.choose(predictions.gain, predictions.novel).tolist() == [0, 0, 0]


def test_paraphrases_that_go_apart_are_counted(test):
    some = test.select(range(4))
    gain = np.array([[0, 0.3], [0, 0.1], [0, 0.5], [0, 0.6]])

    def paraphrases_of(questions):
        asked = replace(some, questions=tuple(questions))
        return measure(FILE, Predictions(None, gain), asked, {}).paraphrases

    evaluation = paraphrases_of("aabb")
    assert (evaluation.questions, evaluation.same_model) == (2, 0.5)
    assert evaluation.spread == pytest.approx(0.15)
    assert paraphrases_of("abcd") is None


def test_wordings_of_a_question_are_drawn_together(test):
    """Each prompt twice is no more evidence than once."""
    some = test.select(range(200))
    twice = test.select([*range(200), *range(200)])
    gain = np.stack([np.zeros(200), some.gain + np.random.default_rng(0).normal(0, 1, 200)], axis=1)
    predictions, doubled = Predictions(None, gain), Predictions(None, np.tile(gain, (2, 1)))
    twice = replace(twice, questions=tuple(str(i) for i in range(200)) * 2)
    rest = {"length": Predictions(None, np.zeros((400, 2)))}
    once = measure(FILE, predictions, some, {})
    together = measure(FILE, doubled, twice, rest)

    def width(band):
        return band.high - band.low

    for pick in (lambda f: f.metrics["apgr"], lambda f: f.routed.quality, lambda f: f.routed.cost):
        assert width(pick(together)) == pytest.approx(width(pick(once)), rel=1e-6)
    assert width(together.over["length"]) == pytest.approx(width(once.metrics["apgr"]), rel=1e-6)


def test_it_is_json_without_nan(evaluation):
    assert json.loads(json.dumps(evaluation.as_dict(), allow_nan=False))["scorer"] == "group"


def test_an_evaluation_comes_back_from_json(evaluation, test):
    text = json.dumps(evaluation.as_dict(), allow_nan=False)
    again = Evaluation.from_dict(json.loads(text))
    assert json.dumps(again.as_dict(), allow_nan=False) == text
    assert again.routed == evaluation.routed and again.calibration == evaluation.calibration
    assert again.histogram == evaluation.histogram and again.examples == evaluation.examples
    assert again.groups == evaluation.groups and again.perfect == evaluation.perfect
    assert str(again) == str(evaluation)
    assert f"{100 * evaluation.routed.share:.1f} % of calls" in str(evaluation)
    assert np.array_equal(again.report.curve.low, evaluation.report.curve.low)


def test_what_is_not_defined_comes_back_from_json(test):
    """Three models, several wordings, no probabilities, a strong model that is no better."""
    same = replace(
        test.select(range(60)),
        models=("a", "b", "c"),
        right=np.ones((60, 3)),
        cost=np.tile([1.0, 2.0, 3.0], (60, 1)),
        questions=tuple(str(i // 2) for i in range(60)),
        groups=None,
    )
    models = [
        {"name": name, "backend": f"{name}=nano-s", "cost": cost}
        for name, cost in (("a", 1.0), ("b", 2.0), ("c", 3.0))
    ]
    worth = {"on": "worth", "value": float("inf"), "sentence": "s"}
    file = router_file.make(**content(models=models, threshold=worth, default="c"))
    predictions = Predictions(None, np.zeros((60, 3)), np.arange(60) % 2 == 0)
    undefined = measure(file, predictions, same, {"length": predictions})
    assert np.isnan(undefined.metrics["auc"].value) and undefined.threshold == np.inf
    assert np.isnan(undefined.report.oracle_apgr) and undefined.report.oracle_lift == 0
    assert undefined.novel == 0.5 and undefined.by_price is not None
    text = json.dumps(undefined.as_dict(), allow_nan=False)
    again = Evaluation.from_dict(json.loads(text))
    assert json.dumps(again.as_dict(), allow_nan=False) == text
    assert np.isnan(again.metrics["auc"].value) and again.threshold == np.inf
    assert again.by_price == undefined.by_price and again.paraphrases == undefined.paraphrases


def test_the_line_by_price_passes_through_the_router_s_point(test):
    """With novel prompts, too: they cost what the default costs, at any price."""
    some = test.select(range(400))
    cost = np.tile([1.0, 2.0, 4.0], (400, 1))
    right = np.stack([some.weak, some.strong, some.strong], axis=1)
    three = replace(some, models=("a", "b", "c"), right=right, cost=cost)
    models = [
        {"name": name, "backend": f"{name}=nano-s", "cost": cost}
        for name, cost in (("a", 1.0), ("b", 2.0), ("c", 4.0))
    ]
    cheap = {"on": "worth", "value": float("inf"), "sentence": "s"}
    file = router_file.make(**content(models=models, threshold=cheap, default="c", unit="calls"))
    novel = np.arange(400) % 4 == 0
    gain = np.random.default_rng(0).normal(size=(400, 3)) * [0, 1, 1]
    evaluation = measure(file, Predictions(None, gain, novel), three, {})
    assert evaluation.by_price.cost[0] == evaluation.routed.cost.value == pytest.approx(1 + 3 / 4)
    assert evaluation.by_price.quality[0] == pytest.approx(evaluation.routed.quality.value)


def test_an_older_evaluation_is_read(evaluation):
    """Before groups and lines, when novel prompts were called far and the expensive side dear."""
    older = json.loads(json.dumps(evaluation.as_dict()))
    for name in ("groups", "perfect", "by_price"):
        older.pop(name)
    older["far"] = older.pop("novel")
    for side in ("just", "surely"):
        older["examples"][f"{side} dear"] = older["examples"].pop(f"{side} expensive")
    for examples in older["examples"].values():
        for example in examples:
            example.pop("score")
    again = Evaluation.from_dict(older)
    assert (
        again.routed == evaluation.routed and again.novel == evaluation.novel and not again.groups
    )
    assert [e.prompt for e in again.examples["just expensive"]] == [
        e.prompt for e in evaluation.examples["just expensive"]
    ]
    without = Evaluation.from_dict({**older, "histogram": {}, "calibration": []})
    assert without.histogram is None


@pytest.mark.parametrize("broken", [{}, [], {"scorer": "x"}, {"calibration": [{"model": 1}]}])
def test_anything_else_is_no_evaluation(evaluation, broken):
    content = {**evaluation.as_dict(), **broken} if "calibration" in broken else broken
    with pytest.raises(InvalidInput, match="not an evaluation"):
        Evaluation.from_dict(content)
