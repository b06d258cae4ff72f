"""Which prompts are unlike those that a router was fitted on."""

from __future__ import annotations

import numpy as np
from tests.routing.labels import outcomes

from pliant.routing.scorers import load, make
from pliant.routing.scorers.novelty import NoveltyDetector, WithNovelty


def detector() -> NoveltyDetector:
    return NoveltyDetector.fit(outcomes(600, 1).prompts, outcomes(200, 2).prompts)


def test_prompts_like_those_of_training_are_not_novel_and_another_language_is():
    fitted = detector()
    assert fitted.novel(outcomes(400, 3).prompts).mean() < 0.05
    others = ["Wie spät ist es denn in Berlin?", "def f(x): return x", "今日は", ""]
    assert fitted.novel(others).all()


def test_a_scorer_is_saved_with_its_novelty_detector(tmp_path):
    train = outcomes(300, 1)
    scorer = WithNovelty(make("length").fit(train), detector())
    scorer.save(tmp_path)
    loaded, prompts = load(tmp_path), [*train.prompts[:5], "Wie spät ist es denn?"]
    assert loaded.kind == scorer.kind == "length"
    assert np.array_equal(loaded.predict(prompts).novel, [False] * 5 + [True])
    assert np.allclose(loaded.predict(prompts).gain, scorer.predict(prompts).gain)
    assert make("length").fit(train).predict(prompts).novel is None
