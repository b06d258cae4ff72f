"""Fitting, evaluating and the live router send every prompt to the same model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from tests.routing.labels import outcomes as labels_of
from tests.routing.minimal_scorer import content

from pliant.errors import InvalidInput
from pliant.routing import Goal, Outcomes, Router
from pliant.routing.decision_rule import DecisionRule
from pliant.routing.fitting.calibrating import calibrate, choose_threshold, threshold_entry
from pliant.routing.fitting.evaluate import measure
from pliant.routing.fitting.fit import fit
from pliant.routing.goals.thresholds import threshold
from pliant.routing.prompts import Prompt, text_of
from pliant.routing.router_file import RouterFile, make
from pliant.routing.scorers import Predictions, Scorer
from pliant.routing.scorers.protocol import State

NAMES = ("small", "middle", "large")
GOALS = [
    "30 % of calls",
    "4 usd a prompt",
    "90 % of the large model's quality",
    "at most 8 % worse",
]


class Table(Scorer):
    """Predictions that were written down before."""

    kind = "letters"

    def __init__(self, prompts: Sequence[str], predictions: Predictions) -> None:
        self.rows = {prompt: i for i, prompt in enumerate(prompts)}
        self.predictions = predictions

    def fit(self, train: Outcomes, choice: Outcomes | None = None, seed: int = 0) -> Self:
        return self

    def predict(
        self, prompts: Sequence[Prompt], groups: Sequence[str] | None = None
    ) -> Predictions:
        at = [self.rows[text_of(prompt)] for prompt in prompts]
        novel = self.predictions.novel
        return Predictions(None, self.predictions.gain[at], None if novel is None else novel[at])

    def state(self) -> State:
        return State()

    def load_state(self, state: State) -> None: ...


def world(models: int, n: int = 800, seed: int = 0) -> tuple[Outcomes, Predictions]:
    """A fifth of the prompts are novel; by their gain the cheap model would answer those."""
    rng = np.random.default_rng(seed)
    hard = rng.beta(0.6, 1.2, n)
    names = (*NAMES[: models - 1], NAMES[-1])
    chances = 1 - hard[:, None] * np.linspace(1, 0.45, models)
    novel = rng.random(n) < 0.2
    gain = chances - chances[:, :1] + rng.normal(scale=0.05, size=(n, models))
    gain[novel] *= 0.2
    gain[:, 0] = 0
    cost = rng.uniform(0.8, 1.2, (n, models)) * np.geomspace(1, 9, models)
    right = (rng.random((n, models)) < chances).astype(float)
    prompts = tuple(f"prompt {i}" for i in range(n))
    return Outcomes(prompts, names, right, cost, unit="usd"), Predictions(None, gain, novel)


def router_file(outcomes: Outcomes, **changes: Any) -> RouterFile:
    models = [
        {"name": name, "backend": f"{name}=openai:m@http://127.0.0.1:9/v1", "cost": cost}
        for name, cost in zip(outcomes.models, outcomes.cost.mean(axis=0).tolist(), strict=True)
    ]
    threshold = {"on": "worth", "value": 0.0, "sentence": "not chosen yet"}
    fields = {"unit": "usd", "models": models, "default": "large", "threshold": threshold}
    return make(**content(**{**fields, **changes}))


def live_choices(
    file: RouterFile, outcomes: Outcomes, predictions: Predictions
) -> np.ndarray[Any, Any]:
    """The index of the model that the live router names for each prompt."""
    with Router(file, Table(outcomes.prompts, predictions)) as router:
        names = [router.choose(prompt).model for prompt in outcomes.prompts]
    return np.array([file.names.index(name) for name in names])


@pytest.mark.parametrize("goal", GOALS)
@pytest.mark.parametrize("models", [2, 3])
@pytest.mark.parametrize("default", ["large", "small"])
@pytest.mark.parametrize("policy", ["default", "ignore"])
def test_a_threshold_does_in_the_live_router_what_it_reports(
    models: int, goal: str, default: str, policy: str
) -> None:
    outcomes, predictions = world(models)
    # The prices of the file are not the mean costs of this split.
    file = router_file(replace(outcomes, cost=outcomes.cost**0.9), default=default, novel=policy)
    threshold = choose_threshold(Goal.parse(goal), predictions, outcomes, file.costs, file.novel_to)
    file = router_file(
        replace(outcomes, cost=outcomes.cost**0.9),
        default=default,
        novel=policy,
        threshold=threshold_entry(threshold, None),
    )
    live = live_choices(file, outcomes, predictions)
    rows = np.arange(len(outcomes))
    shares = np.bincount(live, minlength=models) / len(outcomes)
    assert threshold.shares == tuple(shares.tolist()) and max(shares) < 1
    assert threshold.quality == outcomes.right[rows, live].mean()
    assert threshold.cost == outcomes.cost[rows, live].mean()
    assert file.rule.choose(predictions.gain, predictions.novel).tolist() == live.tolist()
    routed = measure(file, predictions, outcomes, {}).routed
    assert tuple(routed.shares.values()) == threshold.shares
    assert routed.quality.value == pytest.approx(threshold.quality)
    assert routed.cost.value == pytest.approx(threshold.cost)


@pytest.mark.parametrize("models", [2, 3])
def test_novel_prompts_count_in_a_budget(models: int) -> None:
    outcomes, predictions = world(models)
    rows = np.arange(len(outcomes))
    for share in (0.25, 0.3, 0.6):
        threshold = choose_threshold(Goal("share", share), predictions, outcomes)
        live = live_choices(
            router_file(outcomes, threshold=threshold_entry(threshold, None)), outcomes, predictions
        )
        assert share - 0.01 < (live == models - 1).mean() <= share
    for cost in (3.0, 4.0, 7.0):
        threshold = choose_threshold(Goal("cost", cost, None, "usd"), predictions, outcomes)
        live = live_choices(
            router_file(outcomes, threshold=threshold_entry(threshold, None)), outcomes, predictions
        )
        assert cost - 0.1 < outcomes.cost[rows, live].mean() <= cost


def test_a_budget_that_novel_prompts_alone_exceed_is_refused() -> None:
    for models in (2, 3):
        outcomes, predictions = world(models)
        assert predictions.novel is not None
        share = predictions.novel.mean()
        with pytest.raises(InvalidInput, match=f"{100 * share:.4g} % of calls to large"):
            choose_threshold(Goal("share", 0.1), predictions, outcomes)
        exactly = choose_threshold(Goal("share", float(share)), predictions, outcomes)
        assert exactly.share == share
        with pytest.raises(InvalidInput, match="no threshold costs less than"):
            choose_threshold(Goal("cost", 2.0, None, "usd"), predictions, outcomes)


def test_a_quality_that_novel_prompts_prevent_is_refused() -> None:
    outcomes, predictions = world(3)
    for goal in (Goal("quality", 1.0), Goal("quality", 1.0, 0.9), Goal("risk", 0.001)):
        with pytest.raises(InvalidInput, match="because novel prompts go to small"):
            choose_threshold(goal, predictions, outcomes, novel_to=0)


def test_a_proof_counts_novel_prompts_as_they_are_routed() -> None:
    """Novel prompts go to the cheap model: a proof that forgot them would break its promise."""
    population, predictions = world(3, n=20_000, seed=1)
    novel = predictions.novel
    assert novel is not None
    gain = np.where(novel[:, None], 10 * predictions.gain, predictions.gain)
    rng, rows = np.random.default_rng(0), np.arange(len(population))
    prices, grid = population.cost.mean(axis=0), np.linspace(-0.2, 0.6, 40) / 8
    broken = {"counted": 0, "forgotten": 0}
    limit, times = 0.09, 100
    goal = Goal("risk", limit, 0.9)
    for _ in range(times):
        drawn = rng.integers(0, len(population), 800)
        some = population.select(drawn)
        for name, flags in (("counted", novel[drawn]), ("forgotten", np.zeros(800, bool))):
            try:
                result = threshold(goal, gain[drawn], some, grid, prices, flags, novel_to=0)
            except InvalidInput:  # nothing is proved, so nothing is promised
                continue
            chosen = result.models_for(gain, novel)
            quality = population.right[rows, chosen].mean()
            broken[name] += bool(quality < population.strong.mean() - limit)
    assert broken["counted"] <= 10 + 3.1 * 3 < broken["forgotten"]


def test_the_safest_threshold_is_proved_where_novel_prompts_go_elsewhere() -> None:
    """On this split no prompt is novel, so the loss of -inf is 0; 40 prompts prove little."""
    outcomes, _ = world(2, n=40)
    gain, none, goal = outcomes.gain, np.zeros(40, bool), Goal("risk", 0.02)
    assert threshold(goal, gain, outcomes).value == -np.inf
    assert threshold(goal, gain, outcomes, novel=none).value == -np.inf
    with pytest.raises(InvalidInput, match="not proved"):
        threshold(goal, gain, outcomes, novel=none, novel_to=0)


def test_a_router_that_is_calibrated_anew_keeps_its_budget_at_its_own_prices(
    tmp_path: Path,
) -> None:
    backends = {f"model-{j}": f"openai:m@http://127.0.0.1:9{j}/v1" for j in range(3)}
    fit(labels_of(400, 1, models=3), tmp_path / "r", scorers=["text"], backends=backends)
    new = labels_of(300, 5, models=3)
    foreign = tuple(p if i % 5 else f"Wie spät ist es, {p}?" for i, p in enumerate(new.prompts))
    new = replace(new, prompts=foreign, cost=new.cost * [1, 3, 2])
    for goal in ("30 % of calls", "1 calls a prompt", "95 % of the large model's quality"):
        threshold = calibrate(tmp_path / "r", new, goal).threshold
        with Router.load(tmp_path / "r", ledger=None) as router:
            decisions = [router.choose(prompt) for prompt in new.prompts]
        assert 60 <= sum(decision.novel for decision in decisions) < 70
        calls = [decision.model for decision in decisions]
        assert threshold.shares == tuple(calls.count(name) / 300 for name in new.models)


# --- the rule itself -----------------------------------------------------------------------------

VALUES = st.sampled_from([-np.inf, -0.5, 0.0, 0.25, 0.5, np.inf])
QUARTERS = st.integers(-4, 4).map(lambda x: x / 4)


@given(arrays(float, (20, 3), elements=QUARTERS), arrays(bool, 20), VALUES, st.booleans())
def test_the_chosen_model_is_the_first_preference(
    gain: np.ndarray[Any, Any], novel: np.ndarray[Any, Any], value: float, priced: bool
) -> None:
    models = 3 if priced else 2
    for novel_to in (None, 0, models - 1):
        rule = DecisionRule(value, models, (1.0, 2.0, 5.0) if priced else None, novel_to)
        orders = [
            rule.preference(row, flag)
            for row, flag in zip(gain[:, :models], novel.tolist(), strict=True)
        ]
        assert [order[0] for order in orders] == rule.choose(gain[:, :models], novel).tolist()
        assert all(sorted(order) == list(range(models)) for order in orders)


def test_ties_go_to_the_cheaper_model() -> None:
    assert DecisionRule(0.5, 2).choose([0.5, 0.51]).tolist() == [0, 1]
    rule = DecisionRule(0.25, 3, (0.0, 1.0, 2.0))
    assert rule.choose([[0, 0.25, 0.5], [0, 0.25, 0.51]]).tolist() == [0, 2]
    assert rule.preference([0, 0.25, 0.5]) == (0, 1, 2)


@pytest.mark.parametrize("prices", [(5.0, 1.0, 2.0), (2.0, 2.0, 2.0), (3.0, 2.0, 1.0)])
def test_the_rule_does_not_take_the_expensive_model_for_the_strong_one(
    prices: tuple[float, ...],
) -> None:
    """At inf the cheapest answers, at 0 the likelier right, at -inf the last, whatever it costs."""
    gain = np.array([[0, 0.3, 0.2], [0, -0.4, -0.1], [0, 0.1, 0.6]])

    def choose(value: float) -> list[int]:
        return DecisionRule(value, 3, prices).choose(gain).tolist()

    assert choose(0.0) == [1, 0, 2] and choose(-np.inf) == [2, 2, 2]
    assert choose(np.inf) == ([1, 0, 2] if len(set(prices)) == 1 else [np.argmin(prices)] * 3)
    assert DecisionRule(0.0, 3, prices).choose(np.zeros((1, 3))) == np.argmin(prices)
    if len(set(prices)) > 1:
        assert choose(-1000.0) == [2, 2, 2], "far below 0 as at -inf"


def test_novel_prompts_go_to_the_default_and_then_to_the_strongest() -> None:
    rule = DecisionRule(0.1, 4, (1.0, 2.0, 3.0, 4.0), novel_to=1)
    assert rule.choose([[0, 0, 0, 9.0]] * 2, [True, False]).tolist() == [1, 3]
    assert rule.preference([0, 0, 0, 9.0], novel=True) == (1, 3, 2, 0)
    assert rule.choose([[0, 0, 0, 9.0]]).tolist() == [3]
