"""The race trains all alike, puts everything back, and recommends only what it can show."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tests.gradients.audit.conftest import rows_like

from pliant.errors import InvalidInput
from pliant.gradients import GradientConfig, attach
from pliant.gradients.audit import race
from pliant.gradients.audit.contenders import STANDARD, Contender
from pliant.gradients.audit.result import Race, Run

SPARSE = Contender("tokens", GradientConfig())
HALF = Contender("rows", share=0.5)


def run(contender: Contender, losses: Any) -> Run:
    return Run(contender, 10, 0.1, 1.0, (((0.0, 2.0), (1.0, 1.0)),), np.asarray(losses, float))


def raced(ours: Any, standard: Any, **others: Any) -> Race:
    runs = [run(SPARSE, ours), *(run(HALF, losses) for losses in others.values())]
    return Race((*runs, run(STANDARD, standard)), np.full(20, 10), 1.0, None)


def noisy(level: float, seeds: int = 3, noise: float = 0.05) -> Any:
    """Losses of 20 rows of 10 tokens around a level, for each seed."""
    rows = np.linspace(-1, 1, 20)
    wobble = noise * np.array([[-1.0], [0.0], [1.0]])[:seeds]
    return 10 * (level + 0.2 * rows[None] + wobble)


def test_what_is_clearly_better_wins() -> None:
    found = raced(noisy(0.7), noisy(1.0))
    assert found.winner.contender == SPARSE
    assert found.gain(found.winner).value == pytest.approx(0.3)
    assert found.sentence.startswith("Use sampled .25, sparse: ")


def test_what_is_a_little_better_on_average_does_not() -> None:
    seeds = noisy(1.0)[::-1] * np.array([[0.90], [1.02], [1.0]])  # one lucky seed
    found = raced(seeds, noisy(1.0))
    assert found.gain(found.runs[0]).value > 0
    assert found.winner.contender == STANDARD
    assert found.sentence.startswith("Train as usual: ")


def test_one_seed_shows_nothing() -> None:
    found = raced(noisy(0.5, seeds=1), noisy(1.0, seeds=1))
    assert found.winner.contender == STANDARD and "one seed" in found.sentence
    assert found.as_dict()["runs"][0]["gain"]["low"] is None


@pytest.mark.parametrize(("steps", "conclusive"), [(1, False), (9, False), (10, True)])
def test_a_race_of_a_few_steps_could_not_tell(steps: int, conclusive: bool) -> None:
    """However much better a contender is: where its training would lead, nobody saw."""
    better = raced(noisy(0.5), noisy(1.0))
    short = replace(better, runs=tuple(replace(run, steps=steps) for run in better.runs))
    assert short.is_conclusive == conclusive
    assert short.as_dict()["conclusive"] == conclusive
    if conclusive:
        assert short.winner is short.runs[0]
    else:
        assert short.winner is short.standard, "auto=True then trains as usual"
        assert short.sentence.startswith("Could not tell: ")
        assert f"trained for only {steps} step" in str(short)


def test_of_two_that_are_better_the_best_wins() -> None:
    found = raced(noisy(0.8), noisy(1.0), half=noisy(0.6))
    assert found.winner.contender == HALF
    assert found.sentence.startswith("Use smaller batches, and random sequences, 50%: ")


def test_what_diverged_is_no_winner_and_no_number() -> None:
    found = raced(np.full((3, 20), math.nan), noisy(1.0))
    assert found.winner.contender == STANDARD
    json.dumps(found.as_dict(), allow_nan=False)


def test_more_contenders_make_it_harder_to_win() -> None:
    alone, among = raced(noisy(0.9), noisy(1.0)), raced(noisy(0.9), noisy(1.0), half=noisy(1.2))
    assert among.gain(among.runs[0]).level > alone.gain(alone.runs[0]).level


def test_each_gets_the_operations_of_as_many_standard_steps(model: Any) -> None:
    gradients = attach(model, GradientConfig())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows, held_out = rows_like(32), rows_like(12)
    rng = torch.get_rng_state()
    found = race(model, rows, held_out, steps=4, seeds=2, lr=1e-2, points=2, turns=1)
    assert [r.contender.kind for r in found.runs] == [
        "tokens",
        "tokens",
        "hardest_rows",
        "rows",
        "standard",
    ]
    assert found.standard.steps == 4
    for one in found.runs:
        assert one.operations_a_step is not None
        assert one.steps == round(4 / one.operations_a_step)
        assert len(one.curves) == 2 and len(one.curves[0]) == 3 and one.curves[0][0][0] == 0
        assert one.curves[0][0][1] == found.standard.curves[0][0][1]  # all begin alike
        assert one.curves[0][-1] == (1.0, pytest.approx(one.losses[0].sum() / found.counts.sum()))
    assert found.counts.sum() == 12 * 23
    assert found.loss(found.standard) < found.standard.curves[0][0][1]  # it learns
    assert found.runs[0].curves[0] != found.runs[0].curves[1]  # and no two seeds alike
    assert all(before[name].equal(value) for name, value in model.state_dict().items())
    assert torch.get_rng_state().equal(rng) and not model.training
    assert gradients.metrics() == {} and all(p.grad is None for p in model.parameters())


def test_a_contender_against_itself_ends_even(model: Any) -> None:
    """All tokens through the other code path is standard training, step by step."""
    everything = Contender("tokens", GradientConfig(engine="exact", selection="all"))
    found = race(
        model,
        rows_like(16),
        rows_like(8),
        steps=6,
        seeds=2,
        lr=1e-2,
        turns=1,
        contenders=[everything],
    )
    np.testing.assert_allclose(found.runs[0].losses, found.standard.losses, rtol=1e-4)
    assert found.winner.contender == STANDARD


def test_seconds_buy_steps_by_what_each_costs(model: Any) -> None:
    found = race(model, rows_like(16), rows_like(4), seconds=0.2, seeds=1, contenders=[HALF])
    for one in found.runs:
        assert one.steps == max(1, int(0.2 / one.seconds_a_step))
    assert "equal time" in found.sentence


def test_a_method_of_your_own_that_trains_as_usual_ends_even(model: Any) -> None:
    def prepare(model: Any) -> Any:
        return lambda batch: model(**batch).loss

    own = Contender("custom", title="my method", prepare=prepare)
    result = race(
        model, rows_like(16), rows_like(8), steps=6, seeds=2, lr=1e-2, turns=1, contenders=[own]
    )
    np.testing.assert_array_equal(result["my method"].losses, result.standard.losses)
    assert result["my method"].operations_a_step is None
    json.dumps(result.as_dict())


def test_dense_steps_train_every_token_in_each_lap(model: Any) -> None:
    dense = Contender("tokens", GradientConfig(dense_first=100))
    result = race(
        model, rows_like(16), rows_like(8), steps=5, seeds=2, lr=1e-2, turns=1, contenders=[dense]
    )
    assert result.runs[0].steps == 5, "a dense step costs what a standard one does"
    np.testing.assert_allclose(result.runs[0].losses, result.standard.losses, rtol=1e-4)


def test_of_averaged_weights_a_point_does_not_depend_on_where_the_curve_ends(model: Any) -> None:
    rows, held_out = rows_like(16), rows_like(8)
    terms: Any = {"seeds": 1, "lr": 1e-2, "turns": 1, "contenders": []}
    short = race(model, rows, held_out, steps=3, points=1, average_weights=True, **terms)
    long = race(model, rows, held_out, steps=6, points=2, average_weights=True, **terms)
    assert short.standard.curves[0][1][1] == long.standard.curves[0][1][1]
    falling = race(model, rows, held_out, steps=6, points=2, **terms)
    assert falling.standard.curves[0][1][1] != long.standard.curves[0][1][1]


def test_each_contender_may_have_its_own_learning_rate(model: Any) -> None:
    lr = {STANDARD: 1e-2, HALF: 0.0}
    result = race(
        model, rows_like(16), rows_like(8), steps=3, seeds=1, lr=lr, turns=1, contenders=[HALF]
    )
    (_, begin), *_, (_, end) = result[HALF.name].curves[0]
    assert end == begin > result.standard.curves[0][-1][1]


def test_seeds_may_be_named(model: Any) -> None:
    rows, held_out = rows_like(16), rows_like(8)
    terms: Any = {"steps": 3, "lr": 1e-2, "turns": 1, "contenders": [HALF]}
    both = race(model, rows, held_out, seeds=2, **terms)
    second = race(model, rows, held_out, seeds=(1,), **terms)
    assert both[HALF.name].curves[1] == second[HALF.name].curves[0]
    assert both[HALF.name].curves[0] != second[HALF.name].curves[0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "give one"),
        ({"seconds": 1.0, "steps": 3}, "give one"),
        ({"steps": 0}, "budget of 0"),
        ({"seconds": math.nan}, "budget of nan"),
        ({"steps": 3, "seeds": 0}, "seeds = 0"),
        ({"steps": 3, "batch_size": 0}, "batch_size = 0"),
        ({"steps": 3, "turns": 0}, "turns = 0"),
    ],
)
def test_bad_terms_are_named(model: Any, options: Any, said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        race(model, rows_like(4), rows_like(4), **options)


def test_no_rows_are_named(model: Any) -> None:
    with pytest.raises(InvalidInput, match="not 4 and 0"):
        race(model, rows_like(4), [], steps=1)
