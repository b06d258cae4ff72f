"""Which prompts are unlike those that a router was fitted on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.routing.labels import outcomes

from pliant.errors import CorruptFile
from pliant.routing.outcomes import Outcomes
from pliant.routing.scorers import load, make
from pliant.routing.scorers.known_grams import BITS, KNOWN_GRAMS, KnownGrams, bits
from pliant.routing.scorers.linear import folds
from pliant.routing.scorers.novelty import NOVELTY, NoveltyDetector, WithNovelty
from pliant.routing.scorers.protocol import read_arrays, write_arrays

OTHERS = ["Wie spät ist es denn in Berlin?", "def f(x): return x", "今日は"]


def detector(train: Outcomes, **options: object) -> NoveltyDetector:
    return NoveltyDetector.fit(train, [folds(train, 5, 0)], **options)


def without(task: str) -> tuple[Outcomes, Outcomes, Outcomes]:
    """Labels without a task, other prompts of the known tasks, and prompts of the task."""
    labels = outcomes(900, 1)
    unseen = np.array(labels.groups) == task
    known = np.flatnonzero(~unseen)
    return labels.select(known[:400]), labels.select(known[400:]), labels.select(unseen)


def test_prompts_like_those_of_training_are_not_novel_and_others_are():
    fitted = detector(outcomes(600, 1))
    assert fitted.novel(outcomes(400, 3).prompts).mean() < 0.1
    assert fitted.novel(OTHERS).all()


@pytest.mark.parametrize("task", ["prove", "spell", "times", "total"])
def test_a_left_out_task_in_known_notation_is_novel(task):
    train, known, unseen = without(task)
    fitted = detector(train)
    assert fitted.novel(unseen.prompts).mean() > 0.9
    assert fitted.novel(known.prompts).mean() < 0.1


def test_distance_counts_in_units_of_what_is_usual_for_the_task():
    """Essays that share few words are known; the same distance from a template is novel."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("aeiklmnorst"), 6)) for _ in range(2_000)]
    essays = [" ".join(rng.choice(words, 30)) for _ in range(300)]
    template = [f"add the numbers {i} and {i + 7} for me please" for i in range(300)]
    both = (*essays, *template)
    train = replace(outcomes(600, 1), prompts=both, groups=None)
    other = [f"sum the letters {i} and {i + 7} for us cheers" for i in range(200, 250)]
    one_scale = detector(train, prior=1e9)
    assert detector(train).novel(other).mean() > 0.9 > one_scale.novel(other).mean()


def test_the_share_of_false_alarms_is_the_one_that_is_allowed():
    train, known, _ = without("prove")
    for allowed in (0.02, 0.2):
        fitted = detector(train, false_alarms=allowed)
        assert fitted.out_of_fold.mean() <= allowed
        assert fitted.novel(known.prompts).mean() <= allowed + 0.05


def test_equal_prompts_are_no_neighbours_of_each_other():
    """Else prompts that the labels hold twice would make all others look distant."""
    train = outcomes(300, 1)
    twice = train.select(np.repeat(np.arange(300), 2))
    assert detector(twice).novel(outcomes(300, 3).prompts).mean() < 0.1


def test_the_scorers_own_vectors_count_where_it_has_some():
    train, rng = outcomes(300, 1), np.random.default_rng(0)
    near, away = rng.normal(size=(300, 8)) + 10, rng.normal(size=(50, 8)) - 10
    fitted = detector(train, vectors=near)
    same_text = outcomes(50, 3).prompts
    assert fitted.novel(same_text, away).all()
    assert fitted.novel(same_text, rng.normal(size=(50, 8)) + 10).mean() < 0.2


def test_fifty_labels_and_one_fold_of_one_text_are_enough():
    few = outcomes(50, 1)
    assert detector(few).novel(OTHERS).any()
    same = few.select(np.zeros(50, dtype=int))
    assert np.isfinite(detector(same).surprise(["another"])).all()


class OfLength(type(make("length"))):  # type: ignore[misc]
    """A scorer with vectors."""

    def vectors(self, prompts):
        return np.array([[1.0, len(str(prompt))] for prompt in prompts])


@pytest.mark.parametrize("embeds", [False, True])
def test_a_scorer_is_saved_with_its_novelty_detector(tmp_path, embeds):
    train = outcomes(300, 1)
    inner = OfLength() if embeds else make("length")
    fitted = detector(train, vectors=inner.vectors(train.prompts))
    scorer = WithNovelty(inner.fit(train), fitted)
    scorer.save(tmp_path)
    loaded, prompts = load(tmp_path), [*outcomes(100, 5).prompts, *OTHERS]
    if embeds:
        loaded = WithNovelty(inner, loaded.detector)
    assert loaded.kind == scorer.kind == "length"
    assert np.array_equal(loaded.predict(prompts).novel, scorer.predict(prompts).novel)
    assert loaded.predict(prompts).novel[-len(OTHERS) :].all()
    assert np.allclose(loaded.predict(prompts).gain, scorer.predict(prompts).gain)
    assert inner.predict(prompts).novel is None


def test_a_router_of_pliant_01_decides_as_before(tmp_path):
    train = outcomes(300, 1)
    make("length").fit(train).save(tmp_path)
    table = np.zeros(BITS, dtype=np.bool_)
    table[[bit for prompt in train.prompts for bit in bits(prompt)]] = True
    KnownGrams(table, 0.8).save(tmp_path)
    loaded = load(tmp_path)
    assert (tmp_path / KNOWN_GRAMS).name == "familiar.safetensors"
    assert loaded.predict([*train.prompts[:5], *OTHERS]).novel.tolist() == [False] * 5 + [True] * 3


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("words.indptr", np.array([0, 9])),
        ("words.idf", np.ones(3)),
        ("surface.points", np.ones((2, 3))),
        ("surface.std", np.ones(2)),
        ("surface.std", np.zeros(21)),
        ("words.scale.std", np.zeros(200)),
        ("words.scale.known", np.zeros(0)),
        ("bound", np.ones(2)),
        ("words.scale.mean", None),
    ],
)
def test_a_damaged_detector_is_refused(tmp_path, name, value):
    detector(outcomes(200, 1)).save(tmp_path)
    arrays = read_arrays(tmp_path / NOVELTY)
    arrays.pop(name)
    write_arrays(tmp_path / NOVELTY, arrays if value is None else {**arrays, name: value})
    with pytest.raises(CorruptFile, match="not what Pliant writes"):
        NoveltyDetector.load(Path(tmp_path))
