"""What goals promise over many label sets: the plain one on average, the proved ones each time."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from pliant.routing import Goal, Outcomes, Threshold
from pliant.routing.decision_rule import sweep
from pliant.routing.fitting.fit import GOAL
from pliant.routing.goals.optimism import internal_target
from pliant.routing.goals.proof import Proof
from pliant.routing.goals.thresholds import threshold

PLAIN = "95 % of the large model's quality"


def population(n: int = 20_000) -> tuple[np.ndarray, Outcomes]:
    """Of qualities .67 and .82, with a prediction that knows a little of what is hard."""
    rng = np.random.default_rng(7)
    hard = rng.beta(0.6, 1.2, n)
    right = rng.random((n, 2)) < np.stack([1 - hard, 1 - 0.55 * hard], axis=1)
    gain = 0.45 * hard + rng.normal(scale=0.12, size=n)
    prompts = tuple(map(str, range(n)))
    outcomes = Outcomes(prompts, ("small", "large"), right.astype(float), np.tile([0.0, 1], (n, 1)))
    return gain, outcomes


def test_the_default_goal_is_kept_by_at_least_four_of_five_label_sets() -> None:
    gain, known = population()
    rng, floor = np.random.default_rng(0), 0.95 * known.strong.mean()
    broken, saved = 0, 0.0
    for _ in range(100):
        rows = rng.integers(0, len(gain), 255)
        strong = threshold(GOAL, gain[rows], known.select(rows)).strong(gain)
        broken += np.where(strong, known.strong, known.weak).mean() < floor
        saved += (1 - strong.mean()) / 100
    assert broken <= 20 + 3.1 * math.sqrt(100 * 0.16) and saved > 0.2
    assert Goal.parse(GOAL).confidence == 0.8


def test_the_plain_goal_is_met_on_average_where_the_first_that_passes_misses_it() -> None:
    gain, known = population()
    rng, floor = np.random.default_rng(1), 0.95 * known.strong.mean()
    ours, first = [], []
    for _ in range(200):
        rows = rng.integers(0, len(gain), 150)
        sample = known.select(rows)
        steps = sweep(gain[rows], sample).steps
        meets = steps.qualities >= 0.95 * sample.strong.mean()
        for values, into in (
            (threshold(PLAIN, gain[rows], sample).value, ours),
            (float(steps.values[meets.argmax()]), first),
        ):
            into.append(np.where(gain > values, known.strong, known.weak).mean() - floor)
    assert np.mean(first) < -0.003 < 0 <= np.mean(ours) < 0.015


@pytest.mark.parametrize("amount", [0.0, 0.6, 0.95, 1.0])
def test_a_higher_goal_has_a_higher_internal_target_and_the_same_one_again(amount: float) -> None:
    gain, known = population(300)
    swept = sweep(gain, known)
    target = internal_target(amount, swept)
    assert target >= amount and target == internal_target(amount, swept)
    assert internal_target(min(1.0, amount + 0.05), swept) >= target


def test_predictions_out_of_fold_need_a_wider_margin() -> None:
    gain, known = population(600)
    for goal in (GOAL, "at most 5 % worse, with 95 % confidence"):
        exact, wider = (threshold(goal, gain, known, cross_fitted=how) for how in (False, True))
        assert exact.share < wider.share < 1
    plain = [threshold(PLAIN, gain, known, cross_fitted=how) for how in (False, True)]
    assert plain[0] == plain[1]


def test_a_proof_that_saves_nothing_says_how_many_labels_would() -> None:
    gain, known = population()
    goal = "at most 2 % worse, with 95 % confidence"
    few = threshold(goal, gain[:150], known.select(np.arange(150)))
    assert few.share == 1 and few.more_labels is not None
    labels, share = few.more_labels
    words = f"With about {labels:,} labelled prompts like these it could probably be met at"
    assert words in str(few) and f"{100 * share:.1f} % of calls to large" in str(few)
    assert Threshold.from_json(json.loads(json.dumps(few.to_json()))) == few
    assert labels > 1.1 * 150
    rows = np.arange(labels)
    assert threshold(goal, gain[rows], known.select(rows)).share < 1


def test_where_enough_is_proved_nothing_is_said_of_more_labels() -> None:
    gain, known = population(4000)
    assert threshold(GOAL, gain, known).more_labels is None


def test_models_that_complement_each_other_are_proved_where_chance_decides_on_few_calls() -> None:
    """Equally good models, each on its half: the first thresholds alone would prove nothing."""
    rng = np.random.default_rng(3)
    expected = rng.uniform(-0.4, 0.4, (100, 200))
    saved = 0.0
    for gain in expected:
        right = rng.random((200, 2)) < np.stack([0.4 - gain / 2, 0.4 + gain / 2], axis=1)
        prompts, costs = tuple(map(str, range(200))), np.tile([0.0, 1], (200, 1))
        labels = Outcomes(prompts, ("small", "large"), right.astype(float), costs)
        saved += (1 - threshold(GOAL, gain, labels).share) / 100
    assert saved > 0.45


def test_no_label_chooses_where_a_proof_starts() -> None:
    """A strong model that is often right leaves a wide limit, with which another start was chosen:
    of two sequences, the one that the same labels favoured."""
    gain, costs = np.repeat([-0.2, 0.3], [60, 340]), np.tile([0.0, 1], (400, 1))
    prompts, starts = tuple(map(str, range(400))), set()
    for quality in (1.0, 0.4):
        strong = np.arange(400) % 10 < 10 * quality
        right = np.stack([np.zeros(400), strong], axis=1)
        labels = Outcomes(prompts, ("small", "large"), right, costs)
        starts.add(Proof(Goal.parse(GOAL), sweep(gain, labels))._is_easier_at_0())
    assert starts == {True}
