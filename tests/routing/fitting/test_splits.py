"""The test split serves once, a prompt is predicted by fits without it, and both are on record."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from tests.routing.labels import outcomes

from pliant.errors import CorruptFile, InvalidInput
from pliant.routing.fitting.splits import (
    FEWEST,
    HASHES,
    OUT_OF_FOLD,
    Splits,
    learned_from,
    out_of_fold,
    split,
    write_hashes,
)
from pliant.routing.outcomes import Outcomes
from pliant.routing.scorers import Predictions, make
from pliant.routing.scorers.protocol import write_arrays


def asked_twice(n: int) -> Outcomes:
    """Every question in two wordings, one after the other."""
    return replace(outcomes(2 * n, 1), questions=tuple(str(i // 2) for i in range(2 * n)))


def incomplete(labels: Outcomes, rows: np.ndarray) -> Outcomes:
    """The same without the grades of the last model in these rows."""
    right = labels.right.copy()
    right[rows, -1] = np.nan
    return replace(labels, right=right)


def test_no_prompt_serves_two_purposes() -> None:
    """One is in the test split or in `learn`, and there in one fold of each partition."""
    labels = outcomes(1000, 1)
    splits = split(labels, seed=3)
    learn, test = splits.learn, splits.test
    assert set(learn.prompts).isdisjoint(test.prompts)
    assert sorted(learn.prompts + test.prompts) == sorted(labels.prompts)
    assert splits.sizes() == {"learn": 850, "test": 150} and splits.train is learn
    for folds in splits.partitions:
        assert sorted(np.concatenate(folds).tolist()) == list(range(len(learn)))


@pytest.mark.parametrize("n", [100, 500])
def test_the_wordings_of_a_question_stay_together(n: int) -> None:
    splits = split(asked_twice(n))
    questions = np.array(splits.learn.questions)
    assert set(questions).isdisjoint(splits.test.questions or ())
    for folds in splits.partitions:
        asked = [set(questions[rows]) for rows in folds]
        assert len(asked) == 5 and all(not a & b for a, b in combinations(asked, 2))


def test_few_labels_are_divided_more_often_than_many() -> None:
    for n, repeats in ((200, 3), (1_500, 2), (4_000, 1)):
        splits = split(outcomes(n, 1))
        assert len(splits.partitions) == repeats
        words = {1: "by 5-fold", 2: "two repeats of 5-fold", 3: "three repeats of 5-fold"}
        assert words[repeats] in splits.how
    first, second, _ = split(outcomes(200, 1)).partitions
    assert any(not np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_fifty_labels_are_enough_and_forty_nine_are_not() -> None:
    assert FEWEST == 50
    assert split(outcomes(50, 1)).sizes() == {"learn": 35, "test": 15}
    with pytest.raises(InvalidInput, match=r"^49 labels: .*label 1 more prompts") as error:
        split(outcomes(49, 1))
    assert "\n" not in str(error.value)
    with pytest.raises(InvalidInput, match="^40 labels of all models"):
        split(incomplete(outcomes(60, 1), np.arange(20)))


@pytest.mark.parametrize("different", [1, 2, 9])
def test_too_few_different_prompts_are_refused(different: int) -> None:
    labels = outcomes(60, 1)
    prompts = tuple(f"prompt {i % different}" for i in range(60))
    with pytest.raises(
        InvalidInput, match=f"60 labels of {different} different prompts: a fit needs 10"
    ):
        split(replace(labels, prompts=prompts))


# --- incomplete labels ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def partial() -> Splits:
    """Of half of the questions one wording was asked of one model alone."""
    return split(incomplete(asked_twice(150), np.arange(0, 300, 4)))


def test_incomplete_labels_train_and_serve_no_other_purpose(partial: Splits) -> None:
    assert partial.incomplete is not None
    for part in (partial.learn, partial.test):
        assert part.complete.all()
    learn = len(partial.learn)
    assert partial.train.prompts == partial.learn.prompts + partial.incomplete.prompts
    assert np.array_equal(partial.train.right[:learn], partial.learn.right)
    assert partial.train.complete.all()
    for folds in partial.partitions:
        assert sorted(np.concatenate(folds).tolist()) == list(range(learn))


def test_no_wording_of_a_test_prompt_trains(partial: Splits) -> None:
    assert partial.incomplete is not None
    tested, trained = set(partial.test.questions or ()), set(partial.incomplete.questions or ())
    assert tested.isdisjoint(trained) and trained
    assert len(partial.incomplete) < 75, "some are wordings of a test prompt"


def test_an_incomplete_wording_of_a_prompt_is_held_out_with_it(partial: Splits) -> None:
    """Otherwise its grade would be known when the prompt is predicted."""
    questions = np.array(partial.train.questions)
    of_learn = range(len(partial.learn))
    for folds, wider in zip(partial.partitions, partial.train_partitions, strict=True):
        for fold, rows in zip(folds, wider, strict=True):
            assert set(fold) == set(rows) & set(of_learn)
            rest = np.setdiff1d(np.arange(len(questions)), rows)
            assert set(questions[fold]).isdisjoint(questions[rest])


# --- what is on record ---------------------------------------------------------------------------


def predictions_of(labels: Outcomes) -> Predictions:
    predictions = make("length").fit(labels).predict(labels.prompts)
    return replace(predictions, novel=np.arange(len(labels)) % 5 == 0)


def test_out_of_fold_predictions_are_read_as_they_were_written(tmp_path: Path) -> None:
    labels, others = outcomes(80, 1), outcomes(20, 2)
    predictions = predictions_of(labels)
    write_hashes(tmp_path, labels.prompts, predictions)
    asked = (*others.prompts[:7], *(text.upper() for text in labels.prompts[::-1]))
    read, known = out_of_fold(tmp_path, asked)
    assert known.tolist() == list(range(7, 87)), "up to case and white space, and no others"
    for name in ("right", "gain", "novel"):
        assert np.allclose(getattr(read, name), getattr(predictions, name)[::-1], atol=1e-6)
    assert read.novel is not None and read.novel.dtype == np.bool_
    read.check(labels.select(np.arange(80)[::-1]), "length")
    assert learned_from(tmp_path, asked).tolist() == [False] * 7 + [True] * 80


def test_a_scorer_without_probabilities_or_flags_has_none_on_record(tmp_path: Path) -> None:
    labels = outcomes(10, 1)
    write_hashes(tmp_path, labels.prompts, Predictions(None, predictions_of(labels).gain))
    read, _ = out_of_fold(tmp_path, labels.prompts)
    assert read.right is None and read.novel is None


def test_incomplete_prompts_are_learned_from_and_have_no_predictions(tmp_path: Path) -> None:
    """Even once every model has been asked them: the scorer has seen them."""
    labels, partly = outcomes(30, 1), outcomes(5, 2).prompts
    write_hashes(tmp_path, labels.prompts, predictions_of(labels), partly)
    assert learned_from(tmp_path, partly).all() and not len(out_of_fold(tmp_path, partly)[1])


def test_an_older_router_has_no_out_of_fold_predictions(tmp_path: Path) -> None:
    labels = outcomes(30, 1)
    write_hashes(tmp_path, labels.prompts, predictions_of(labels))
    (tmp_path / OUT_OF_FOLD).unlink()
    read, known = out_of_fold(tmp_path, labels.prompts)
    assert len(read) == len(known) == 0
    assert learned_from(tmp_path, labels.prompts).all() and (tmp_path / HASHES).is_file()


def test_a_damaged_record_is_refused(tmp_path: Path) -> None:
    hashes = np.arange(3, dtype=np.uint32)
    for arrays in ({"prompt": hashes}, {"prompt": hashes, "gain": np.zeros((2, 2))}):
        write_arrays(tmp_path / OUT_OF_FOLD, arrays)
        with pytest.raises(CorruptFile, match=OUT_OF_FOLD):
            out_of_fold(tmp_path, ["a"])
    (tmp_path / OUT_OF_FOLD).write_bytes(b"")
    with pytest.raises(CorruptFile, match=OUT_OF_FOLD):
        out_of_fold(tmp_path, ["a"])
