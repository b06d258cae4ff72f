"""A stack: weights that are not negative, members that earn their place, and one file tree."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
from tests.routing.labels import outcomes
from tests.routing.minimal_scorer import content

from pliant.errors import CorruptFile
from pliant.routing.fitting.evaluate import evaluate
from pliant.routing.fitting.splits import write_hashes
from pliant.routing.outcomes import Outcomes
from pliant.routing.prompts import Prompt
from pliant.routing.router import Router
from pliant.routing.router_file import make as make_file
from pliant.routing.scorers import load, make
from pliant.routing.scorers.base_model import Probe
from pliant.routing.scorers.linear import folds
from pliant.routing.scorers.protocol import Groups, Predictions, Prefilling, Prompts, Scorer
from pliant.routing.scorers.stack import Mixture, Stack, chosen_members, out_of_fold

LABELS, NEW = outcomes(200, 1), outcomes(40, 2)
FOLDS = folds(LABELS, 4, 0)
TRUE = LABELS.right - LABELS.right[:, :1]


def guess(noise: float, seed: int = 0, scale: float = 1.0) -> Predictions:
    """The gain with an error of this size."""
    gain = scale * (TRUE + np.random.default_rng(seed).normal(0, noise, TRUE.shape))
    gain[:, 0] = 0
    return Predictions(np.clip(LABELS.right + 0.1, 0, 1), gain / np.abs(gain).max())


@pytest.fixture(scope="module")
def stack() -> Stack:
    made = Stack([make("text"), make("length")])
    made.cross_validate(LABELS, [FOLDS])
    return made.fit(LABELS)


def test_weights_are_not_negative() -> None:
    reversed_ = guess(0.3, scale=-1.0)
    mixture = Mixture.fit([guess(0.3), reversed_], LABELS.right)
    assert mixture.weights[0] > 0.5 and mixture.weights[1] == 0
    assert mixture.bias[0] == 0
    mixed = mixture([guess(0.3), reversed_])
    mixed.check(LABELS, "stack")
    assert mixed.gain.mean(axis=0) == pytest.approx(TRUE.mean(axis=0), abs=0.05)


def test_two_independent_guesses_are_better_than_one() -> None:
    each = [guess(0.8, seed) for seed in (1, 2)]

    def error(predictions: Predictions) -> float:
        return float(((predictions.gain - TRUE) ** 2)[:, 1].mean())

    alone = [error(out_of_fold([predictions], LABELS.right, FOLDS)) for predictions in each]
    assert error(out_of_fold(each, LABELS.right, FOLDS)) < 0.9 * min(alone)


def test_the_weights_of_a_fold_come_from_the_others() -> None:
    each, first = [guess(0.5, 1), guess(0.5, 2)], FOLDS[0]
    changed = LABELS.right.copy()
    changed[first] = 1 - changed[first]
    before, after = (out_of_fold(each, right, FOLDS).gain for right in (LABELS.right, changed))
    assert np.array_equal(before[first], after[first])
    assert not np.allclose(before[FOLDS[1]], after[FOLDS[1]])


def test_a_member_joins_only_if_it_is_shown_to_help() -> None:
    noise = Predictions(None, np.random.default_rng(0).uniform(-1, 1, TRUE.shape))
    each = {"first": guess(0.8, 1), "same": guess(0.8, 1), "noise": noise}
    assert chosen_members(each, "first", LABELS.right, FOLDS) == ["first"]
    each["other"] = guess(0.8, 2)
    assert chosen_members(each, "first", LABELS.right, FOLDS) == ["first", "other"]
    many = {str(seed): guess(0.8, seed) for seed in range(6)}
    assert len(chosen_members(many, "0", LABELS.right, FOLDS)) == 4


def test_probabilities_come_from_the_members_that_have_some() -> None:
    with_right, without = guess(0.5, 1), replace(guess(0.5, 2), right=None)
    mixture = Mixture.fit([with_right, without], LABELS.right)
    right = mixture([with_right, without]).right
    assert right is not None and np.allclose(right, with_right.right)
    assert mixture([without, without]).right is None


def test_it_predicts_the_weighted_sum_of_its_members(stack: Stack) -> None:
    assert stack.mixture is not None
    gain = stack.predict(NEW.prompts).gain
    each = [member.predict(NEW.prompts).gain for member in stack.members]
    expected = sum(w * g for w, g in zip(stack.mixture.weights, each, strict=True))
    assert np.allclose(gain, expected + stack.mixture.bias)
    assert set(stack.chosen()["weights"]) == {"text", "length"}
    assert stack.flops(NEW.prompts) == 0


def test_a_saved_stack_predicts_the_same(stack: Stack, tmp_path: Path) -> None:
    stack.save(tmp_path)
    again = load(tmp_path)
    assert isinstance(again, Stack) and again.kind == "stack" and not again.needs_groups
    expected, values = stack.predict(NEW.prompts), again.predict(NEW.prompts)
    assert np.allclose(values.gain, expected.gain, atol=1e-5)
    assert np.allclose(values.right, expected.right, atol=1e-5)  # type: ignore[arg-type]


def test_another_member_than_the_saved_one_is_refused(stack: Stack, tmp_path: Path) -> None:
    stack.save(tmp_path)
    make("random").fit(LABELS).save(tmp_path / "member-0")
    with pytest.raises(CorruptFile, match="its members are not text, length"):
        load(tmp_path)


def test_one_member_that_needs_groups_makes_the_stack_need_them(tmp_path: Path) -> None:
    members = [make(kind).fit(LABELS) for kind in ("group", "length")]
    made = Stack(members, Mixture(np.ones(2), np.zeros(2)))
    made.save(tmp_path)
    assert made.needs_groups and load(tmp_path).needs_groups
    assert np.ptp(made.predict(["x", "x"], ["times", "total"]).last_gain) > 0.1


def test_a_member_that_reads_a_model_reads_it_on_the_named_device(tmp_path: Path) -> None:
    members = [make("length").fit(LABELS), make("probe", base="nano-s").fit(outcomes(40, 1))]
    Stack(members, Mixture(np.ones(2), np.zeros(2))).save(tmp_path / "scorer")
    models = [{"name": f"model-{j}", "backend": f"nano-{'sl'[j]}", "cost": j} for j in range(2)]
    make_file(**content(models=models, default="model-1", scorer={"kind": "stack"})).write(tmp_path)
    write_hashes(tmp_path, (), Predictions(None, np.zeros((0, 2))))
    with Router.load(tmp_path, device="cpu") as router:
        assert isinstance(router.scorer, Stack) and isinstance(router.scorer.members[1], Probe)
        assert router.scorer.members[1].base.device == "cpu"
    assert evaluate(tmp_path, NEW, device="cpu").verdict.reads_model  # type: ignore[union-attr]
    Stack(members[:1], Mixture(np.ones(1), np.zeros(2))).save(tmp_path / "scorer")
    assert not evaluate(tmp_path, NEW).verdict.reads_model  # type: ignore[union-attr]


class Reading(Scorer):
    """Offers what a scorer that reads a model offers, from predictions that it has already."""

    kind = "reading"

    def __init__(self, inner: Scorer) -> None:
        self.inner = inner

    def fit(self, train: Outcomes, choice: Outcomes | None = None, seed: int = 0) -> Self:
        return self

    def predict(self, prompts: Prompts, groups: Groups = None) -> Predictions:
        raise AssertionError("its model reads the prompt anyway")

    def while_answering(self, prompt: Prompt) -> Prefilling | None:
        if prompt == "no offer":
            return None
        predict: Any = lambda scores: self.inner.predict([prompt])  # noqa: E731
        return Prefilling(None, predict)  # type: ignore[arg-type]


def test_the_member_that_reads_a_model_is_read_while_it_answers(stack: Stack) -> None:
    assert stack.mixture is not None
    reading = Stack([Reading(stack.members[0]), stack.members[1]], stack.mixture)
    offer = reading.while_answering(NEW.prompts[0])
    assert offer is not None
    gain = offer.predictions(None).gain  # type: ignore[arg-type]
    assert np.allclose(gain, stack.predict(NEW.prompts[:1]).gain)
    assert reading.while_answering("no offer") is None
    assert stack.while_answering(NEW.prompts[0]) is None, "no member reads a model"
    two = Stack([Reading(stack.members[0])] * 2, stack.mixture)
    assert two.while_answering(NEW.prompts[0]) is None, "one prefill cannot serve two models"
