"""Which scorer is selected: the preferred one, unless another is shown to be better."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from tests.routing.labels import outcomes

from pliant.errors import InvalidInput
from pliant.routing.fitting.ladder import (
    PREFERRED,
    Rung,
    climb,
    eligible,
    gap,
    out_of_fold,
    select,
    value_of,
)
from pliant.routing.fitting.splits import split
from pliant.routing.outcomes import Outcomes
from pliant.routing.scorers import Predictions, make
from pliant.routing.scorers.protocol import Prompts
from pliant.routing.scorers.vectors import Reader, Vectors
from pliant.stats import Floats

HELD = outcomes(400, 1)
CHANCE = np.random.default_rng(0)
EXACT = HELD.gain + CHANCE.normal(0, 0.3, 400)
NOISE = CHANCE.normal(0, 1, 400)


def rung(kind: str, last_gain: Floats, held: Outcomes = HELD) -> Rung:
    gain = np.stack([np.zeros(len(held)), last_gain], axis=1)
    value = value_of(gain, held)
    return Rung(kind, make(kind), Predictions(None, gain), value, 0.0, 0.0, 0)


CLOSE, LUCKY = sorted(
    (HELD.gain + CHANCE.normal(0, 1.5, 400) for _ in range(2)),
    key=lambda gain: rung("text", gain).worth,
)
"""Equally noisy; one is luckier."""


def test_a_scorer_that_looks_better_by_chance_is_not_selected() -> None:
    text, knn = rung("text", CLOSE), rung("knn", LUCKY)
    assert knn.worth > text.worth and gap(knn, text, HELD).low <= 0
    assert select([knn, text], HELD) is text


def test_one_that_is_shown_to_be_better_is() -> None:
    text, knn, tfidf = rung("text", CLOSE), rung("knn", EXACT), rung("tfidf", NOISE)
    assert gap(knn, text, HELD).low > 0
    assert select([text, knn, tfidf], HELD) is knn
    even_better = rung("length", HELD.gain + 0.01 * NOISE)
    assert select([text, knn, tfidf, even_better], HELD) is even_better


def test_the_first_preferred_kind_stays_even_if_another_looks_better() -> None:
    assert PREFERRED == ("text+group", "text+embed", "text")
    text, embed = rung("text", LUCKY), rung("text+embed", CLOSE)
    assert text.worth > embed.worth and select([text, embed], HELD) is embed
    group = rung("text+group", CLOSE)
    assert select([text, embed, group], HELD) is embed
    assert select([text, embed, group], HELD, groups_known=True) is group


def test_without_a_preferred_kind_the_best_is_selected() -> None:
    tfidf, knn = rung("tfidf", CLOSE), rung("knn", LUCKY)
    assert select([tfidf, knn], HELD) is knn


def test_chance_is_never_selected_and_a_group_only_where_it_is_known() -> None:
    group, text, random = rung("group", EXACT), rung("text", CLOSE), rung("random", EXACT)
    assert select([group, text, random], HELD) is text
    assert select([group, text], HELD, groups_known=True) is group
    assert eligible([random, rung("oracle", EXACT), group]) == []
    with pytest.raises(InvalidInput, match="can be selected: add text or cpx"):
        select([random, group], HELD)


def test_scorers_are_compared_at_equal_cost() -> None:
    """A better order that costs half of what can be saved is not better."""
    text, knn = rung("text", CLOSE), rung("knn", EXACT)
    dear = replace(knn, scoring=np.array([0.5, 0.5]), cost=0.5)
    assert select([text, knn], HELD) is knn and select([text, dear], HELD) is text


# --- a whole ladder ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def partial() -> Outcomes:
    """Of a third of the questions, one of two wordings was asked of one model alone."""
    labels = outcomes(240, 1)
    right = labels.right.copy()
    right[::6, 1] = np.nan
    return replace(labels, right=right, questions=tuple(str(i // 2) for i in range(240)))


class FirstWord(Reader):
    """Reads each prompt as which word it begins with, of sixty."""

    name, layers, model = "first word", (0,), None  # type: ignore[assignment]

    def compute(self, prompts: Prompts, layers: Sequence[int]) -> Vectors:
        words = [WORDS.index(str(prompt).split()[0]) for prompt in prompts]
        return np.eye(len(WORDS), dtype=np.float32)[words][:, None]

    def flops(self, prompts: Prompts, layer: int) -> float:
        return 1.0


WORDS = [f"{a}{b}" for a in "abcdef" for b in "ghijklmnop"]


@pytest.mark.parametrize("kind", ["knn", "embed"])
def test_no_grade_is_known_through_predictions_of_missing_ones(kind: str) -> None:
    """Each word has a coin, and prompts that begin with it, of which one alone shows the coin."""
    coins = np.random.default_rng(0).integers(0, 2, (60, 2)).astype(float)
    texts = [f"{word} {word} {3 * end}" for end in "wxyz" for word in WORDS]
    right = np.tile(coins, (4, 1))
    right[60:, 1] = np.nan
    splits = split(Outcomes(tuple(texts), ("a", "b"), right, np.tile([0.0, 1.0], (240, 1))))
    scorer = make(kind, base=FirstWord()) if kind == "embed" else make(kind)
    predictions, true = out_of_fold(scorer, splits, 0), splits.learn.right[:, 1]
    assert predictions.right is not None
    assert np.corrcoef(predictions.right[:, 1], true)[0, 1] < 0.3


def test_the_best_comes_first_and_the_others_know_how_far_they_are_behind(
    partial: Outcomes,
) -> None:
    splits = split(partial)
    rungs = climb(splits, ["random", "tfidf", "text"], None, 0)
    worth = [each.worth for each in rungs]
    assert worth == sorted(worth, reverse=True) and rungs[0].behind is None
    assert all(each.behind is not None and each.behind.value <= 0 for each in rungs[1:])
    assert rungs[-1].kind == "random"
    for each in rungs:
        assert len(each.predictions) == len(splits.learn), "incomplete rows are not predicted"
        each.predictions.check(splits.learn, each.kind)
