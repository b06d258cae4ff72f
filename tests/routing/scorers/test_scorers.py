"""Every scorer learns, is saved without a change, and says what it cannot do."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.routing.labels import outcomes

from pliant import attached
from pliant.errors import CorruptFile, InvalidInput
from pliant.routing.metrics.ranking import apgr
from pliant.routing.outcomes import Outcomes
from pliant.routing.scorers import KINDS, Predictions, Scorer, load, make
from pliant.routing.scorers.baselines import Oracle
from pliant.routing.scorers.cpx import Capacity
from pliant.routing.scorers.protocol import read_arrays, write_arrays

TEXTS = ("tfidf", "knn", "text", "text+group")
READ_A_MODEL = ("probe", "cpx")
LEARN = (*TEXTS, *READ_A_MODEL, "group")
ELSEWHERE = ("embed", "text+embed", "stack")
"""Kinds with a file of their own, because they need an encoder or members."""
SAVED = tuple(kind for kind in KINDS if kind not in ("oracle", *ELSEWHERE))
FEW = {"capacities": [Capacity(1, 4)], "epochs": 5}


def fitted(kind: str, choice: bool = False) -> Scorer:
    settings = {} if kind not in READ_A_MODEL else {"base": "nano-s"}
    settings |= FEW if "cpx" in kind else {}
    return make(kind, **settings).fit(outcomes(500, 1), outcomes(100, 2) if choice else None)


@pytest.fixture(scope="module")
def scorers() -> dict[str, Scorer]:
    return {kind: fitted(kind) for kind in SAVED}


@pytest.fixture(scope="module")
def test() -> Outcomes:
    return outcomes(600, 3)


@pytest.mark.parametrize("kind", LEARN)
def test_it_learns_where_something_is_to_gain(scorers, test, kind):
    predictions = scorers[kind].predict(test.prompts, test.groups)
    right, gain = predictions.right, predictions.gain
    # From 500 prompts a linear probe of the small model separates the kinds only in part.
    assert apgr(predictions.last_gain, test) > (0.6 if kind == "probe" else 0.75)
    assert right.shape == gain.shape == (600, 2)
    assert ((right >= 0) & (right <= 1)).all() and (gain[:, 0] == 0).all()
    assert np.allclose(predictions.score, 1 - right[:, 0])


def test_predictions_of_a_wrong_shape_are_named(test):
    right, gain = np.zeros((600, 2)), np.zeros((600, 2))
    for predictions, words in (
        (Predictions(right, gain[:, :1]), r"`gain` has the shape \(600, 1\).*\(600, 2\)"),
        (Predictions(right[:, 0], gain), r"`right` has the shape \(600,\).*\(600, 2\)"),
    ):
        with pytest.raises(InvalidInput, match=words):
            predictions.check(test, "mine")


@pytest.mark.parametrize("kind", SAVED)
def test_a_saved_scorer_predicts_the_same(scorers, test, tmp_path, kind):
    scorers[kind].save(tmp_path / "it")
    again = load(tmp_path / "it")
    some, groups = ["", *test.prompts[:30]], ["?", *test.groups[:30]]
    before, after = scorers[kind].predict(some, groups), again.predict(some, groups)
    assert again.kind == kind
    tolerance = 5e-3 if kind == "knn" else 1e-5  # saves its vectors in half precision
    assert np.allclose(after.gain, before.gain, atol=tolerance)
    assert np.allclose(after.right, before.right, atol=tolerance)
    assert not list(tmp_path.rglob("*.pkl"))


@pytest.mark.parametrize(("kind", "name"), [("tfidf", "head"), ("text", "weights")])
def test_a_gain_is_a_difference_of_probabilities_where_its_fit_is_not(kind, name):
    """Linear fits predict beyond 1; the predicted gain lies within, in the same order."""
    scorer, surely = fitted(kind), outcomes(300, 4)
    before = scorer.predict(surely.prompts).last_gain
    fit = getattr(scorer, name)
    setattr(scorer, name, replace(fit, **{key: 6 * value for key, value in vars(fit).items()
                                          if isinstance(value, np.ndarray)}))  # fmt: skip
    after = scorer.predict(surely.prompts).last_gain
    assert (6 * before > 1.1).any() and (np.abs(after) <= 1).all()
    assert (np.argsort(after, kind="stable") == np.argsort(before, kind="stable")).all()


def test_chance_is_chance_and_always_the_same(scorers, test):
    random = scorers["random"]
    assert abs(apgr(random.predict(test.prompts).last_gain, test) - 0.5) < 0.1
    alone = random.predict([test.prompts[7]]).last_gain[0]
    assert alone == random.predict(test.prompts).last_gain[7]


def test_the_oracle_is_the_bound_and_is_not_saved(test, tmp_path):
    oracle = Oracle(test)
    assert apgr(oracle.predict(test.prompts).last_gain, test) > 0.85
    with pytest.raises(InvalidInput, match="not saved"):
        oracle.save(tmp_path)
    with pytest.raises(InvalidInput, match="made with"):
        oracle.predict(["another prompt"])


def test_messages_are_read_as_texts_are(scorers):
    for kind in ("text", "knn", "cpx", "probe"):
        text = scorers[kind].predict(["times 3 and 4"]).gain
        messages = scorers[kind].predict([[{"role": "user", "content": "times 3 and 4"}]]).gain
        assert np.allclose(text, messages)


def test_numbers_are_the_same_by_their_shapes(scorers):
    shaped, plain = scorers["text"], scorers["tfidf"]
    same = shaped.predict(["total 111111 and 222222", "total 345678 and 901234"]).last_gain
    assert same[0] == same[1]
    assert shaped.words.shapes and not plain.words.shapes


def test_an_unknown_group_gets_the_mean_of_all(scorers):
    train = outcomes(500, 1)
    predictions = scorers["group"].predict(["x", "y"], ["never seen", "times"])
    assert np.allclose(predictions.right[0], train.right.mean(axis=0))
    assert predictions.last_gain[1] > 0.6


def test_shares_are_learned_as_well_as_whole_labels():
    train = outcomes(400, 1)
    soft = Outcomes(train.prompts, train.models, train.right * 0.5 + 0.25, train.cost)
    for kind in ("tfidf", "text", "length"):
        right = make(kind).fit(soft).predict(train.prompts).right
        assert np.allclose(right.mean(axis=0), soft.right.mean(axis=0), atol=0.03)


def test_a_model_that_is_always_right_is_no_error():
    train = outcomes(300, 1)
    right = train.right.copy()
    right[:, 1] = 1
    always = Outcomes(train.prompts, train.models, right, train.cost)
    for kind in ("tfidf", "text", "length"):
        assert make(kind).fit(always).predict(train.prompts[:5]).right[:, 1].min() > 0.95


def test_more_than_two_models_each_have_their_chance():
    three = outcomes(600, 1, models=3)
    right = make("text").fit(three).predict(three.prompts).right
    assert right.shape == (600, 3)
    assert np.allclose(right.mean(axis=0), three.right.mean(axis=0), atol=0.02)


def test_capacity_is_chosen_by_the_choice_split_and_the_others_leave_the_base():
    scorer = make("cpx", base="nano-s", capacities=[Capacity(1, 0), Capacity(1, 4)], epochs=4)
    before = len(attached(scorer.base.model))
    scorer.fit(outcomes(300, 1), outcomes(150, 2))
    assert scorer.errors[str(scorer.capacity)] == min(scorer.errors.values())
    assert len(scorer.errors) == 2
    assert len(attached(scorer.base.model)) == before + 1


@pytest.mark.parametrize("kind", ["probe", "cpx"])
def test_without_a_base_it_says_how_to_name_one(kind):
    with pytest.raises(InvalidInput, match="base='nano-s'"):
        make(kind).fit(outcomes(50))


def test_the_error_about_an_unknown_kind_names_those_like_it():
    with pytest.raises(InvalidInput, match="text\\+group"):
        make("text+gruop")


@pytest.mark.parametrize(
    ("kind", "instead"),
    [("cpx+text", "cpx"), ("pair", "text"), ("tfidf-ridge", "text"), ("tfidf-logistic", "text")],
)
def test_a_kind_that_was_dropped_says_what_to_fit_instead(kind: str, instead: str, tmp_path: Path):
    words = f"{re.escape(repr(kind))}: .* fit the router again with '{instead}'"
    with pytest.raises(InvalidInput, match=words):
        make(kind)
    index = {"format": 1, "kind": kind, "settings": {}}
    (tmp_path / "scorer.json").write_text(json.dumps(index))
    with pytest.raises(CorruptFile, match=f"kind {words}"):
        load(tmp_path)


def test_a_text_scorer_of_an_older_pliant_says_to_fit_again(scorers, tmp_path: Path):
    scorers["tfidf"].save(tmp_path)  # whose arrays are like those that `text` once wrote
    index = json.loads((tmp_path / "scorer.json").read_text())
    del index["digest"]
    (tmp_path / "scorer.json").write_text(json.dumps(index | {"kind": "text"}))
    with pytest.raises(InvalidInput, match="older Pliant.*fit again"):
        load(tmp_path)


def test_a_damaged_folder_is_refused(scorers, tmp_path: Path):
    scorers["text"].save(tmp_path)
    arrays = read_arrays(tmp_path / "scorer.safetensors")
    name = next(name for name, array in arrays.items() if array.dtype.kind == "f")
    write_arrays(tmp_path / "scorer.safetensors", {**arrays, name: arrays[name] + np.inf})
    with pytest.raises(CorruptFile, match=f"{name} holds NaN or infinity"):
        load(tmp_path)
    (tmp_path / "scorer.safetensors").write_bytes(b"no tensors")
    with pytest.raises(CorruptFile, match="truncated or damaged"):
        load(tmp_path)
    (tmp_path / "scorer.json").write_text("[]")
    with pytest.raises(CorruptFile, match="not what Pliant writes"):
        load(tmp_path)
    with pytest.raises(CorruptFile, match="no scorer"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("kind", "name", "change"),
    [
        ("length", "weight", lambda x: np.concatenate([x, x])),
        ("length", "weight", lambda x: x > 0),
        ("length", "weight", lambda x: x[None]),
        ("length", "bias", lambda x: x[:1]),
        ("tfidf", "bias", lambda x: x[:1]),
        ("tfidf", "words.idf", lambda x: x[1:]),
        ("tfidf", "words", lambda x: [-1, *x[1:]]),
        ("tfidf", "words", lambda x: [x[1], *x[1:]]),
        ("tfidf", "shapes", lambda x: "yes"),
        ("text", "surface.std", lambda x: x * 0),
        ("text", "surface.phase", lambda x: x[:0]),
        ("text", "topics.mean", lambda x: x[:1]),
        ("text", "weights.bias", lambda x: x[:1]),
        ("text", "weights.dense", lambda x: x[1:]),
        ("text", "weights.words", lambda x: x[1:]),
        ("text", "weights.products", lambda x: x[:, :, 1:]),
        ("text", "groups", lambda x: None),
    ],
)
def test_an_edited_scorer_is_refused_whatever_its_digest_says(
    scorers, kind: str, name: str, change, tmp_path: Path
):
    """Broadcasting would make numbers of arrays of other shapes."""
    scorers[kind].save(tmp_path)
    index = json.loads((tmp_path / "scorer.json").read_text())
    del index["digest"]
    arrays = read_arrays(tmp_path / "scorer.safetensors")
    of = index["settings"] if name in index["settings"] else arrays
    of[name] = change(of[name])
    write_arrays(tmp_path / "scorer.safetensors", arrays)
    (tmp_path / "scorer.json").write_text(json.dumps(index))
    with pytest.raises(CorruptFile, match="not what Pliant writes"):
        load(tmp_path)
