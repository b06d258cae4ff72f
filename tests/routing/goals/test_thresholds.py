"""Goals are read as they are written; thresholds meet budgets, and proved promises hold."""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pliant.errors import InvalidInput
from pliant.routing import Goal, Outcomes, Threshold
from pliant.routing.goals.thresholds import threshold

RISK = Goal("risk", 0.02)


def outcomes_of(right: np.ndarray, cost: np.ndarray | None = None, unit: str = "calls") -> Outcomes:
    n = len(right)
    default = np.tile([0.0, 1.0], (n, 1))
    return Outcomes(
        tuple(f"p{i}" for i in range(n)),
        ("small", "large"),
        right,
        default if cost is None else cost,
        unit=unit,
    )


def world(n: int, seed: int, soft: bool = False) -> tuple[np.ndarray, Outcomes]:
    """Prompts of which sample are easy for both models, and a prediction that knows them a little.

    As a population it has a quality of .67 for the small and .82 for the large model.
    """
    rng = np.random.default_rng(seed)
    hard = rng.beta(0.6, 1.2, n)
    chances = np.stack([1 - hard, 1 - 0.55 * hard], axis=1)
    samples = 4 if soft else 1
    right = (rng.random((samples, n, 2)) < chances).mean(axis=0)
    gain = 0.45 * hard + rng.normal(scale=0.08, size=n)
    return gain, outcomes_of(right)


@st.composite
def splits(draw: st.DrawFn) -> tuple[np.ndarray, Outcomes]:
    n = draw(st.integers(1, 40))
    gain = draw(arrays(float, n, elements=st.integers(-4, 4).map(lambda x: x / 4)))
    right = draw(arrays(float, (n, 2), elements=st.sampled_from([0.0, 0.5, 1.0])))
    cost = draw(arrays(float, (n, 2), elements=st.sampled_from([0.5, 1.0, 3.0])))
    return gain, outcomes_of(right, cost, "usd")


# --- goals ---------------------------------------------------------------------------------------

WRITTEN = [
    ("30 % of calls", Goal("share", 0.3)),
    ("30% of the calls", Goal("share", 0.3)),
    ("at most 30 percent of all prompts to the large model", Goal("share", 0.3)),
    ("0.3 of calls", Goal("share", 0.3)),
    ("  .3  of\nqueries. ", Goal("share", 0.3)),
    ("95 % of the large model's quality", Goal("quality", 0.95)),
    ("95% of strong's quality", Goal("quality", 0.95)),
    ("at least 0.95 of the accuracy of the strong model", Goal("quality", 0.95)),
    (
        "95 % of the LARGER model\N{RIGHT SINGLE QUOTATION MARK}s quality with 90 % confidence",
        Goal("quality", 0.95, 0.9),
    ),
    ("at most 2 % worse, with 95 % confidence", Goal("risk", 0.02, 0.95)),
    ("at most 2% worse", Goal("risk", 0.02, 0.95)),
    (
        "no more than 0.02 worse than the strong model with .9 probability",
        Goal("risk", 0.02, 0.9),
    ),
    ("$0.50 per 1000 prompts", Goal("cost", 0.0005, None, "usd")),
    ("at most $2,000 per million requests", Goal("cost", 0.002, None, "usd")),
    ("3 dollars per thousand", Goal("cost", 0.003, None, "usd")),
    ("12.5 tokens a prompt", Goal("cost", 12.5, None, "tokens")),
    ("up to 300 ms per call", Goal("cost", 300, None, "ms")),
    ("0.25 calls / prompt", Goal("cost", 0.25, None, "calls")),
]


@pytest.mark.parametrize(("text", "goal"), WRITTEN)
def test_a_goal_is_read_and_said(text: str, goal: Goal) -> None:
    read = Goal.parse(text)
    assert (read.kind, read.confidence, read.unit) == (goal.kind, goal.confidence, goal.unit)
    assert read.amount == pytest.approx(goal.amount, rel=1e-12)
    assert Goal.parse(str(read)) == read


@given(
    st.sampled_from(["share", "quality", "risk", "cost"]),
    st.integers(0, 10**6),
    st.integers(1, 9999),
)
def test_every_goal_is_read_as_it_is_said(kind: str, amount: int, sure: int) -> None:
    sure_ = sure / 10_000 if kind in ("quality", "risk") else None
    goal = Goal(kind, amount / 10**6, sure_, "usd" if kind == "cost" else None)  # type: ignore[arg-type]
    assert Goal.parse(str(goal)) == goal


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("30 %", '"30 % of calls"'),
        ("", "no goal that is understood"),
        ("2 % better", "no goal that is understood"),
        ("30 % of calls with 90 % confidence", "no goal that is understood"),
        ("$5", "no goal that is understood"),
        ("30 of calls", "30 of what"),
        ("120 % of calls", "more than all of it"),
        ("at most 2 % worse, with 100 % confidence", "not between 0 and 1"),
        ("at most 2 % worse, with 95 confidence", "95 of what"),
        ("$5 per 0 prompts", "0 prompts"),
    ],
)
def test_anything_else_is_refused_with_examples(text: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        Goal.parse(text)


@given(st.text(max_size=40))
def test_any_text_is_a_goal_or_refused(text: str) -> None:
    with contextlib.suppress(InvalidInput):
        Goal.parse(text)


# --- budgets and qualities -----------------------------------------------------------------------


@given(splits(), st.floats(0, 1), st.floats(0, 1))
def test_a_budget_is_kept_and_a_larger_one_never_buys_less(
    split: tuple[np.ndarray, Outcomes], a: float, b: float
) -> None:
    gain, outcomes = split
    small, large = (threshold(Goal("share", x), gain, outcomes) for x in sorted((a, b)))
    assert small.share <= min(a, b) + 1e-9
    assert large.value <= small.value and large.share >= small.share
    assert (small.strong(gain) <= large.strong(gain)).all()
    assert small.share == small.strong(gain).mean()


@given(splits(), st.floats(0.5, 3), st.floats(0.5, 3))
def test_so_with_money(split: tuple[np.ndarray, Outcomes], a: float, b: float) -> None:
    gain, outcomes = split
    try:
        small = threshold(Goal("cost", min(a, b), None, outcomes.unit), gain, outcomes)
    except InvalidInput:
        assert outcomes.cost[:, 0].mean() > min(a, b)
        return
    large = threshold(Goal("cost", max(a, b), None, outcomes.unit), gain, outcomes)
    assert small.cost <= min(a, b) * (1 + 1e-6) and large.value <= small.value
    strong = small.strong(gain)
    paid = np.where(strong, outcomes.cost[:, 1], outcomes.cost[:, 0]).mean()
    assert small.cost == pytest.approx(paid)


@given(splits(), st.floats(0, 1), st.floats(0, 1))
def test_a_quality_is_reached_and_a_higher_one_never_costs_fewer_calls(
    split: tuple[np.ndarray, Outcomes], a: float, b: float
) -> None:
    gain, outcomes = split
    low, high = (threshold(Goal("quality", x), gain, outcomes) for x in sorted((a, b)))
    assert low.quality >= min(a, b) * outcomes.strong.mean() - 1e-9
    assert high.share >= low.share and high.value <= low.value
    right = np.where(low.strong(gain), outcomes.strong, outcomes.weak)
    assert low.quality == pytest.approx(right.mean())


@given(splits())
def test_all_of_the_quality_and_all_of_the_calls_can_be_had(
    split: tuple[np.ndarray, Outcomes],
) -> None:
    gain, outcomes = split
    assert threshold(Goal("share", 1), gain, outcomes).value == -math.inf
    assert threshold(Goal("share", 0), gain, outcomes).value == math.inf
    assert threshold(Goal("quality", 1), gain, outcomes).quality >= outcomes.strong.mean() - 1e-9
    if not outcomes.strong_costs_no_more:  # else calls to the other save nothing
        assert threshold(Goal("quality", 0), gain, outcomes).share == 0


def test_equal_predictions_go_together() -> None:
    gain = np.array([0.5] * 5 + [0.1] * 5)
    outcomes = outcomes_of(np.zeros((10, 2)))
    assert threshold(Goal("share", 0.4), gain, outcomes).share == 0
    half = threshold(Goal("share", 0.9), gain, outcomes)
    assert half.share == 0.5 and half.value == pytest.approx(0.3)


def test_a_gain_at_the_threshold_stays_with_the_cheap_model() -> None:
    gain = np.array([0.2, 0.3, 0.3, 0.4] * 500)
    result = threshold(RISK, gain, outcomes_of(np.ones((2000, 2))), [0.3])
    assert result.value == 0.3 and result.share == 0.25  # as where a router decides: gain > value
    assert result.strong([0.3, 0.31]).tolist() == [False, True]
    assert result.models_for([0.3, 0.31]).tolist() == [0, 1]


def test_a_budget_that_cannot_be_is_refused() -> None:
    gain, outcomes = world(20, 0)
    dear = outcomes_of(outcomes.right, np.tile([1.0, 2.0], (20, 1)), "usd")
    with pytest.raises(InvalidInput, match=r"no threshold costs less than \$1.00 a prompt"):
        threshold(Goal("cost", 0.5, None, dear.unit), gain, dear)
    with pytest.raises(InvalidInput, match="are in usd, not tokens"):
        threshold("5 tokens per prompt", gain, dear)
    with pytest.raises(InvalidInput, match="one finite number for each of 20"):
        threshold(Goal("share", 0.1), gain[:3], outcomes)


@pytest.mark.parametrize(
    "goal",
    [
        "30 % of calls",
        "0.2 calls a prompt",
        "95 % of the large model's quality",
        "at most 3 % worse",
    ],
)
def test_a_threshold_says_what_was_chosen_and_is_read_again(goal: str) -> None:
    gain, outcomes = world(1500, 1)
    result = threshold(goal, gain, outcomes)
    words = str(result)
    assert words.startswith(str(Goal.parse(goal))) and "On 1,500 calibration prompts" in words
    assert ("95 % or more" in words) == (result.goal.confidence is not None)
    assert ("no promise" in words) == (result.goal.confidence is None)
    again = Threshold.from_json(json.loads(json.dumps(result.to_json(), allow_nan=False)))
    assert again == result and (again.strong(gain) == result.strong(gain)).all()


def test_thresholds_at_both_ends_are_said_and_kept() -> None:
    gain, outcomes = world(50, 1)
    for share, words in ((0.0, "everything goes to small"), (1.0, "everything goes to large")):
        result = threshold(Goal("share", share), gain, outcomes)
        assert words in str(result)
        text = json.dumps(result.to_json(), allow_nan=False)
        assert Threshold.from_json(json.loads(text)) == result
    for broken in ({}, {**result.to_json(), "value": "much"}, {**result.to_json(), "extra": 1}):
        with pytest.raises(InvalidInput):
            Threshold.from_json(broken)


# --- more than two models ------------------------------------------------------------------------


def three(n: int, seed: int) -> tuple[np.ndarray, Outcomes]:
    """Three models, and predicted gains over the first."""
    rng = np.random.default_rng(seed)
    hard = rng.beta(0.6, 1.2, n)
    chances = np.stack([1 - hard, 1 - 0.75 * hard, 1 - 0.5 * hard], axis=1)
    gain = chances - chances[:, :1] + rng.normal(scale=0.05, size=(n, 3)) * [0, 1, 1]
    cost = rng.uniform(0.8, 1.2, (n, 3)) * [1, 2, 8]
    right = (rng.random((n, 3)) < chances).astype(float)
    prompts = tuple(map(str, range(n)))
    return gain, Outcomes(prompts, ("small", "middle", "large"), right, cost, unit="usd")


def test_two_models_with_equal_prices_are_the_same_either_way() -> None:
    gain, outcomes = world(400, 2)
    both = np.stack([np.zeros(400), gain], axis=1)
    for goal in ("30 % of calls", "0.4 calls a prompt", "90 % of the large model's quality"):
        one, two = threshold(goal, gain, outcomes), threshold(goal, both, outcomes)
        assert (one.strong(gain) == two.strong(both)).all()
        assert (one.quality, one.shares) == (two.quality, two.shares)
    grid = np.linspace(-0.2, 0.6, 50)
    proved = [threshold(Goal("risk", 0.1, 0.9), g, outcomes, grid) for g in (gain, both)]
    assert proved[0].value == proved[1].value and proved[0].shares == proved[1].shares


def test_three_models_share_the_work() -> None:
    gain, outcomes = three(3000, 0)
    result = threshold(Goal("quality", 0.95), gain, outcomes)
    assert result.on == "worth" and min(result.shares) > 0.02 and sum(result.shares) == 1
    assert result.quality >= 0.95 * outcomes.strong.mean()
    chosen = result.models_for(gain)
    rows = np.arange(3000)
    assert result.quality == pytest.approx(outcomes.right[rows, chosen].mean())
    assert result.cost == pytest.approx(outcomes.cost[rows, chosen].mean())
    again = Threshold.from_json(json.loads(json.dumps(result.to_json(), allow_nan=False)))
    assert again == result and (again.models_for(gain) == chosen).all()
    assert "of calls to middle" in str(result)


@pytest.mark.parametrize("budget", [1.1, 2.0, 4.0, 9.0])
def test_a_budget_for_three_models_is_kept(budget: float) -> None:
    gain, outcomes = three(1000, 1)
    result = threshold(Goal("cost", budget, None, "usd"), gain, outcomes)
    assert result.cost <= budget * (1 + 1e-6)
    lower = threshold(Goal("cost", budget * 0.95, None, "usd"), gain, outcomes)
    assert result.value <= lower.value
    share = threshold(Goal("share", budget / 10), gain, outcomes)
    assert share.share <= budget / 10


def test_a_risk_with_three_models_is_kept() -> None:
    gain, population = three(30_000, 4)
    prices = population.cost.mean(axis=0)
    rng, broken, saved = np.random.default_rng(0), 0, 0.0
    rows, goal = np.arange(30_000), Goal("risk", 0.04, 0.9)
    grid = np.linspace(-0.2, 0.6, 40) / (prices[-1] - prices[0])
    for _ in range(200):
        drawn = rng.integers(0, 30_000, 800)
        result = threshold(goal, gain[drawn], population.select(drawn), grid, prices)
        right = population.right[rows, result.models_for(gain)].mean()
        broken += right < population.strong.mean() - 0.04
        saved += (1 - result.share) / 200
    assert broken <= allowed(0.1, 200) and saved > 0.05


def test_many_models_need_a_gain_and_a_price_each() -> None:
    gain, outcomes = three(30, 0)
    with pytest.raises(InvalidInput, match="with 3 models it must be"):
        threshold(Goal("share", 0.3), gain[:, 2], outcomes)
    with pytest.raises(InvalidInput, match="strongest model and the cheapest"):
        threshold(Goal("share", 0.0), gain, outcomes, prices=[2, 3, 1])
    with pytest.raises(InvalidInput, match="one number for each of 3 models"):
        threshold(Goal("share", 0.3), gain, outcomes, prices=[1, 3])


# --- proofs --------------------------------------------------------------------------------------


def allowed(delta: float, times: int) -> float:
    """So many failures of a test of level delta are passed by chance in 1 of 1,000 cases."""
    return times * delta + 3.1 * math.sqrt(times * delta * (1 - delta))


GRID_50 = np.linspace(-0.2, 0.6, 50)


@pytest.mark.parametrize(("n", "epsilon", "delta"), [(700, 0.02, 0.05), (300, 0.05, 0.2)])
def test_a_risk_is_kept_in_as_many_of_1000_draws_as_promised(
    n: int, epsilon: float, delta: float
) -> None:
    """Calibration sets are drawn from a population of which the true risk is known.

    The control, a threshold whose loss on the calibration set is just small enough, breaks it.
    """
    gain, population = world(40_000, 7)
    order = np.argsort(gain)
    true_loss = np.concatenate([[0], population.gain[order].cumsum() / len(gain)])

    def breaks(value: float) -> bool:
        return bool(true_loss[np.searchsorted(gain[order], value, side="right")] > epsilon)

    rng = np.random.default_rng(n)
    broken, naive, saved = 0, 0, 0.0
    for _ in range(1000):
        rows = rng.integers(0, len(gain), n)
        sample = population.select(rows)
        result = threshold(Goal("risk", epsilon, 1 - delta), gain[rows], sample, GRID_50)
        broken += breaks(result.value)
        saved += (1 - result.share) / 1000
        seen = [(sample.gain * (gain[rows] <= value)).mean() for value in GRID_50]
        naive += breaks(float(GRID_50[np.flatnonzero(np.array(seen) <= epsilon)[-1]]))
    assert broken <= allowed(delta, 1000) < naive
    assert saved > 0.02  # to send all to the strong model would prove nothing


def test_shares_of_right_samples_and_qualities_are_proved_too() -> None:
    gain, population = world(40_000, 8, soft=True)
    rng = np.random.default_rng(0)
    broken = {"risk": 0, "quality": 0}
    saved = {"risk": 0.0, "quality": 0.0}
    for _ in range(300):
        rows = rng.integers(0, len(gain), 500)
        sample = population.select(rows)
        for name, result in (
            ("risk", threshold(Goal("risk", 0.03, 0.9), gain[rows], sample, GRID_50)),
            ("quality", threshold(Goal("quality", 0.95, 0.9), gain[rows], sample, GRID_50)),
        ):
            routed = np.where(result.strong(gain), population.strong, population.weak).mean()
            strong = population.strong.mean()
            floor = strong - 0.03 if name == "risk" else 0.95 * strong
            broken[name] += routed < floor
            saved[name] += (1 - result.share) / 300
    assert max(broken.values()) <= allowed(0.1, 300)
    assert min(saved.values()) > 0.02


def test_thirty_prompts_prove_no_two_percent() -> None:
    gain, outcomes = world(30, 0)
    assert threshold(RISK, gain, outcomes).value == -math.inf  # 30 prompts are too few for 2 %


def test_a_lower_delta_or_epsilon_never_saves_more() -> None:
    gain, outcomes = world(3000, 3)
    values = [threshold(Goal("risk", e), gain, outcomes).value for e in (0.01, 0.02, 0.04, 0.08)]
    assert values == sorted(values) and values[-1] > values[0]
    values = [threshold(Goal("risk", 0.03, 1 - d), gain, outcomes).value for d in (0.01, 0.05, 0.2)]
    assert values == sorted(values)


@pytest.mark.parametrize("grid", [[], [math.nan], [[0.1]]])
def test_a_grid_is_checked(grid: list[float]) -> None:
    gain, outcomes = world(30, 0)
    with pytest.raises(InvalidInput, match="grid"):
        threshold(RISK, gain, outcomes, grid)


def test_the_rule_says_where_novel_prompts_go() -> None:
    goal = Goal.parse("30 % of calls")
    chosen = Threshold(np.inf, goal, 9, (1, 0), 0.5, 0.5, 0.9, 1.0, "calls", ("small", "large"))
    assert chosen.rule == "everything goes to small"
    assert replace(chosen, novel_to=0).rule == "everything goes to small"
    elsewhere = "everything goes to small, but novel prompts go to large"
    assert replace(chosen, novel_to=1).rule == elsewhere
