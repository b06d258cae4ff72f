"""What a router learns after its fit: near the learned prompts, and nowhere else."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.routing.labels import outcomes

from pliant.errors import CorruptFile
from pliant.routing.outcomes import Outcomes
from pliant.routing.prompts import Prompt
from pliant.routing.scorers import load, make
from pliant.routing.scorers.corrections import (
    BUCKETS,
    CORRECTIONS,
    MOST,
    Corrections,
    WithCorrections,
    write_background,
)
from pliant.routing.scorers.corrections import background_of as sample_in
from pliant.routing.scorers.features import hashed_counts
from pliant.routing.scorers.linear import folds
from pliant.routing.scorers.novelty import NoveltyDetector, WithNovelty
from pliant.routing.scorers.protocol import Prefilling, Scorer, read_arrays, write_arrays

TRAIN, OTHERS = outcomes(300, 1), outcomes(200, 2)
ELSEWHERE = ["Wie spät ist es denn in Berlin?", "今日は", "", "the weather is fine"]


def poems(n: int, seed: int = 0, right: tuple[float, float] = (0.0, 1.0)) -> Outcomes:
    """Prompts of a task that the scorer never saw; only the large model can do it."""
    draw = np.random.default_rng(seed)
    topics = ["the sea", "a lost friend", "autumn rain", "my city at night", "an old clock"]
    texts = [f"write a poem about {topics[draw.integers(5)]} in {k} lines" for k in range(n)]
    return Outcomes(tuple(texts), TRAIN.models, [list(right)] * n, [[0.0, 1.0]] * n)


def noticing(train: Outcomes) -> Scorer:
    """A scorer that was fitted on these labels and notices other tasks."""
    detector = NoveltyDetector.fit(train, [folds(train, 5, 0)])
    return WithNovelty(make("text").fit(train), detector)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved scorer with a sample of what it was fitted on, as a fit writes it."""
    place = tmp_path_factory.mktemp("scorer")
    noticing(TRAIN).save(place)
    write_background(place, TRAIN.prompts)
    return place


def corrected(folder: Path, learned: Outcomes, salt: bytes | None = None) -> WithCorrections:
    scorer = load(folder)
    predictions = scorer.predict(learned.prompts)
    return WithCorrections(scorer, Corrections.of(learned, predictions, sample_in(folder), salt))


def test_a_new_task_is_learned_and_is_no_longer_novel(folder: Path) -> None:
    new = poems(60, seed=1)
    before = load(folder).predict(new.prompts)
    after = corrected(folder, poems(40)).predict(new.prompts)
    assert before.novel is not None and after.novel is not None
    assert before.novel.mean() > 0.9 and after.novel.mean() < 0.1
    assert np.abs(after.last_gain - 1).mean() < 0.5 * np.abs(before.last_gain - 1).mean()
    assert after.right is not None and before.right is not None
    assert after.right[:, 0].mean() < before.right[:, 0].mean()


def test_elsewhere_nothing_changes_not_even_the_last_bit(folder: Path) -> None:
    prompts = [*OTHERS.prompts, *ELSEWHERE]
    before = load(folder).predict(prompts)
    after = corrected(folder, poems(40)).predict(prompts)
    assert np.array_equal(after.gain, before.gain)
    assert np.array_equal(after.right, before.right)
    assert np.array_equal(after.novel, before.novel)


def test_few_prompts_change_little_and_many_more(folder: Path) -> None:
    new = poems(30, seed=1)
    before = load(folder).predict(new.prompts).last_gain
    moves = [
        np.abs(corrected(folder, poems(n)).predict(new.prompts).last_gain - before).mean()
        for n in (1, 5, 40)
    ]
    assert moves[0] < 0.2 * moves[2] and moves[0] <= moves[1] < moves[2]


def test_what_was_predicted_rightly_is_not_corrected(folder: Path) -> None:
    new = poems(40)
    predictions = load(folder).predict(new.prompts)
    exact = Corrections.of(new, predictions, sample_in(folder))
    none = replace(exact, gain=0 * exact.gain, right=None)
    after = WithCorrections(load(folder), none).predict(poems(30, seed=1).prompts)
    assert np.array_equal(after.gain, load(folder).predict(poems(30, seed=1).prompts).gain)


def test_corrections_stay_differences_and_probabilities(folder: Path) -> None:
    extreme = poems(MOST // 10, right=(1.0, 0.0))
    scorer = corrected(folder, extreme)
    predictions = scorer.predict(extreme.prompts)
    predictions.check(extreme, scorer.kind)


def test_without_a_sample_only_novel_prompts_are_corrected(tmp_path: Path) -> None:
    noticing(TRAIN).save(tmp_path)  # as fits did before they wrote one
    scorer = corrected(tmp_path, poems(40))
    before = load(tmp_path).predict([*OTHERS.prompts, *ELSEWHERE])
    after = scorer.predict([*OTHERS.prompts, *ELSEWHERE])
    assert np.array_equal(after.gain, before.gain)
    new = scorer.predict(poems(30, seed=1).prompts)
    assert new.novel is not None and new.novel.mean() < 0.1


def test_corrections_are_saved_beside_the_scorer(folder: Path, tmp_path: Path) -> None:
    scorer = corrected(folder, poems(40))
    scorer.save(tmp_path)
    loaded, prompts = load(tmp_path), [*poems(20, seed=2).prompts, *OTHERS.prompts[:20]]
    assert isinstance(loaded, WithCorrections) and loaded.kind == scorer.kind == "text"
    assert np.allclose(loaded.predict(prompts).gain, scorer.predict(prompts).gain, atol=1e-4)
    again = load(tmp_path)
    assert np.array_equal(loaded.predict(prompts).gain, again.predict(prompts).gain)


def test_no_table_of_hashes_shows_what_was_learned(folder: Path, tmp_path: Path) -> None:
    learned = poems(40)
    for name in ("a", "b"):
        corrected(folder, learned).save(tmp_path / name)
    a, b = (read_arrays(tmp_path / name / CORRECTIONS) for name in ("a", "b"))
    unsalted = {hashlib.sha256(prompt.encode()).digest()[:16] for prompt in learned.prompts}
    assert not unsalted & {bytes(row) for row in a["hashes"]}
    assert not {bytes(row) for row in a["hashes"]} & {bytes(row) for row in b["hashes"]}
    counts = hashed_counts(learned.prompts, BUCKETS)
    for arrays in (a, b):
        shared = np.isin(np.unique(arrays["learned.indices"]), counts.indices)
        assert shared.mean() < 0.1, "words are hashed with the salt, too"
    assert np.array_equal(
        load(tmp_path / "a").predict(learned.prompts).gain,
        load(tmp_path / "b").predict(learned.prompts).gain,
    )


def test_corrections_without_a_salt_are_to_be_learned_again(folder: Path, tmp_path: Path) -> None:
    corrected(folder, poems(40)).save(tmp_path)
    arrays = read_arrays(tmp_path / CORRECTIONS)
    del arrays["salt"]
    write_arrays(tmp_path / CORRECTIONS, arrays)
    with pytest.raises(CorruptFile, match="a salt: remove it, and learn again"):
        load(tmp_path)


def test_damaged_corrections_are_refused(folder: Path, tmp_path: Path) -> None:
    corrected(folder, poems(40)).save(tmp_path)
    content = (tmp_path / CORRECTIONS).read_bytes()
    make("text").fit(OTHERS).save(tmp_path)
    with pytest.raises(CorruptFile, match="another scorer"):
        load(tmp_path)
    noticing(TRAIN).save(tmp_path)
    for damaged in (content[:-20], content[:100], b"", content.replace(b"hashes", b"h4shes")):
        (tmp_path / CORRECTIONS).write_bytes(damaged)
        with pytest.raises(CorruptFile, match=CORRECTIONS):
            load(tmp_path)


def test_later_grades_replace_earlier_ones(folder: Path) -> None:
    first, second = poems(30), poems(30, right=(1.0, 1.0))
    early = corrected(folder, first).corrections
    late = corrected(folder, second, early.salt).corrections
    merged = early.merged(late)
    assert len(merged) == len(set(first.prompts))
    assert np.array_equal(merged.gain, late.gain) and late.new_since(early) == len(late)
    assert merged.new_since(late) == 0 and early.new_since(None) == len(early)
    more = early.merged(corrected(folder, outcomes(10, 5), early.salt).corrections)
    assert len(more) == len(early) + 10 and more.new_since(early) == 10


def test_predictions_from_a_models_own_prefill_are_corrected(folder: Path) -> None:
    prompt = poems(1, seed=1).prompts[0]

    class Reading(WithNovelty):
        """Offers what a scorer that reads a model offers, from predictions that it has already."""

        def while_answering(self, prompt: Prompt) -> Prefilling:
            return Prefilling(None, lambda scores: self.predict([prompt]))  # type: ignore[arg-type]

    inner = load(folder)
    assert isinstance(inner, WithNovelty)
    corrections = corrected(folder, poems(40)).corrections
    reading = WithCorrections(Reading(inner.scorer, inner.detector), corrections)
    offer = reading.while_answering(prompt)
    assert offer is not None
    corrected_gain = offer.predictions(None).last_gain  # type: ignore[arg-type]
    assert np.array_equal(corrected_gain, reading.predict([prompt]).last_gain)
    assert not np.array_equal(corrected_gain, inner.predict([prompt]).last_gain)
    assert WithCorrections(inner, corrections).while_answering(prompt) is None
