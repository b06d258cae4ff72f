"""Which prompts are unlike those that a router was made on."""

from __future__ import annotations

import numpy as np
from tests.routing.labels import outcomes

from pliant.routing.scorers import load, make
from pliant.routing.scorers.familiar import Familiar, Watched


def familiar() -> Familiar:
    return Familiar.fit(outcomes(600, 1).prompts, outcomes(200, 2).prompts)


def test_like_prompts_are_near_and_another_language_is_far():
    found = familiar()
    assert found.novel(outcomes(400, 3).prompts).mean() < 0.05
    assert found.novel(
        ["Wie spät ist es denn in Berlin?", "def f(x): return x", "今日は", ""]
    ).all()


def test_a_scorer_that_is_watched_is_saved_with_what_it_knows(tmp_path):
    train = outcomes(300, 1)
    watched = Watched(make("length").fit(train), familiar())
    watched.save(tmp_path)
    again, asked = load(tmp_path), [*train.prompts[:5], "Wie spät ist es denn?"]
    assert again.kind == watched.kind == "length"
    assert np.array_equal(again.predict(asked).novel, [False] * 5 + [True])
    assert np.allclose(again.predict(asked).gain, watched.predict(asked).gain)
    assert make("length").fit(train).predict(asked).novel is None
