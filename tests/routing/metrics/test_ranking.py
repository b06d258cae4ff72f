"""Areas under curves obey their algebra, and agree with what is counted by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pliant.errors import InvalidInput
from pliant.routing import Outcomes
from pliant.routing.metrics import ranking as metrics
from pliant.routing.metrics.curves import hull_area, lambda_curve, quality_cost_curve
from pliant.routing.metrics.ranking import aiq, apgr, cpt, oracle_apgr, within_group_apgr


def outcomes_of(
    weak: object, strong: object, groups: object = None, cost: object = None
) -> Outcomes:
    right = np.stack([np.asarray(weak, float), np.asarray(strong, float)], axis=1)
    n = len(right)
    return Outcomes(
        tuple(f"p{i}" for i in range(n)),
        ("small", "large"),
        right,
        np.tile([0.0, 1.0], (n, 1)) if cost is None else np.asarray(cost, float),
        None if groups is None else tuple(map(str, groups)),  # type: ignore[arg-type]
    )


def sample(n: int = 300, seed: int = 0, noise: float = 1.0) -> tuple[np.ndarray, Outcomes]:
    """A prediction that knows something, and labels in five groups."""
    rng = np.random.default_rng(seed)
    weak, strong = rng.random(n) < 0.6, rng.random(n) < 0.8
    result = outcomes_of(weak, strong, rng.integers(0, 5, n), rng.uniform([0, 1], [1, 3], (n, 2)))
    return result.gain + rng.normal(scale=noise, size=n), result


@st.composite
def tables(draw: st.DrawFn) -> tuple[np.ndarray, Outcomes]:
    """Predictions with ties, and labels whose strong model is the better one."""
    n = draw(st.integers(2, 40))
    right = draw(arrays(float, (n, 2), elements=st.sampled_from([0.0, 0.25, 1.0])))
    predicted = draw(arrays(float, n, elements=st.integers(-4, 4).map(lambda x: x / 4)))
    groups = draw(arrays(int, n, elements=st.integers(0, 3)))
    if right[1:, 1].sum() < right[1:, 0].sum():
        right = right[:, ::-1].copy()
    right[0] = 0.0, 1.0  # and that by something: of two alike no order closes a gap
    return predicted, outcomes_of(right[:, 0], right[:, 1], groups)


@given(tables())
def test_apgr_of_the_reversed_ranking_is_its_complement(table: tuple[np.ndarray, Outcomes]) -> None:
    gain, outcomes = table
    assert apgr(-gain, outcomes) == pytest.approx(1 - apgr(gain, outcomes))
    assert within_group_apgr(-gain, outcomes) == pytest.approx(
        1 - within_group_apgr(gain, outcomes)
    )


@given(tables())
def test_only_the_order_counts(table: tuple[np.ndarray, Outcomes]) -> None:
    gain, outcomes = table
    for metric in (apgr, within_group_apgr, cpt, aiq):
        bent = metric(np.exp(3 * gain) + 7, outcomes)
        assert bent == pytest.approx(metric(gain, outcomes), abs=1e-9)


@given(tables(), st.randoms())
def test_the_order_of_the_rows_does_not(table: tuple[np.ndarray, Outcomes], random: object) -> None:
    gain, outcomes = table
    order = list(range(len(gain)))
    random.shuffle(order)  # type: ignore[attr-defined]
    for metric in (apgr, within_group_apgr, cpt, aiq):
        moved = metric(gain[order], outcomes.select(order))
        assert moved == pytest.approx(metric(gain, outcomes), abs=1e-9)


@given(tables())
def test_nothing_beats_the_oracle(table: tuple[np.ndarray, Outcomes]) -> None:
    gain, outcomes = table
    best = oracle_apgr(outcomes)
    assert apgr(gain, outcomes) <= best + 1e-9
    assert within_group_apgr(gain, outcomes) <= best + 1e-9
    assert cpt(outcomes.gain, outcomes) <= cpt(gain, outcomes) + 1e-9
    assert aiq(gain, outcomes) <= aiq(outcomes.gain, outcomes) + 1e-9


@given(tables())
def test_one_prediction_for_all_is_random(table: tuple[np.ndarray, Outcomes]) -> None:
    outcomes = table[1]
    constant = np.zeros(len(outcomes))
    assert apgr(constant, outcomes) == pytest.approx(0.5)
    assert within_group_apgr(constant, outcomes) == pytest.approx(0.5)
    assert cpt(constant, outcomes, 0.8) == pytest.approx(0.8)
    middle = (outcomes.weak.mean() + outcomes.strong.mean()) / 2
    assert aiq(constant, outcomes) == pytest.approx(middle)


@given(st.lists(st.sampled_from([(0, 0), (1, 1), (0, 1), (1, 0)]), min_size=1, max_size=60))
def test_the_oracle_has_its_closed_form(labels: list[tuple[int, int]]) -> None:
    outcomes = outcomes_of(*zip(*labels, strict=True))
    better, worse = (outcomes.gain > 0).mean(), (outcomes.gain < 0).mean()
    if better > worse:
        closed = (better - better**2 / 2 - worse**2 / 2) / (better - worse)
        assert oracle_apgr(outcomes) == pytest.approx(closed)
    else:
        assert math.isnan(oracle_apgr(outcomes))


@settings(max_examples=25)
@given(tables())
def test_ties_are_the_mean_over_their_orders(table: tuple[np.ndarray, Outcomes]) -> None:
    gain, outcomes = table
    rng = np.random.default_rng(0)
    noise = rng.permuted(np.tile(np.arange(len(gain)), (400, 1)), axis=1) * 1e-6
    broken = [apgr(gain + some, outcomes) for some in noise]
    allowed = 5 * np.std(broken) / 20 + 1e-9
    assert apgr(gain, outcomes) == pytest.approx(np.mean(broken), abs=allowed)


def test_apgr_counted_by_hand() -> None:
    outcomes = outcomes_of([0, 1, 0, 1], [1, 1, 1, 0])  # gains 1, 0, 1, -1
    assert outcomes.gain.tolist() == [1, 0, 1, -1]
    # PGR after each call: 1, 2, 2, 1
    assert apgr([4, 2, 3, 1], outcomes) == pytest.approx((0.5 + 1.5 + 2 + 1.5) / 4)
    assert cpt([4, 2, 3, 1], outcomes, 0.5) == pytest.approx(0.125)
    assert cpt([1, 2, 3, 4], outcomes, 1.0) == 1.0
    assert cpt([2, 2, 1, 1], outcomes, 1.0) == pytest.approx(0.5)


def test_aiq_counted_by_hand() -> None:
    outcomes = outcomes_of([0, 0, 1, 1], [1, 1, 1, 0], cost=[[1, 3]] * 4)
    # Quality .5, .75, 1, 1, .75 at a cost of 1, 1.5, 2, 2.5, 3; the hull stays at 1.
    assert aiq([4, 3, 2, 1], outcomes) == pytest.approx((0.75 * 1 + 1 * 1) / 2)
    dear_weak = outcomes_of([0, 0], [1, 1], cost=[[3, 1]] * 2)
    assert math.isnan(aiq([1, 2], dear_weak))


def test_a_hull_is_concave_level_after_its_best_and_ends_at_the_last_cost() -> None:
    def area(cost: list[float], quality: list[float]) -> float:
        return hull_area(np.array(cost), np.array(quality))

    assert area([1, 2, 3], [0.0, 0.1, 1.0]) == pytest.approx(1.0)  # the middle lies below
    assert area([1, 2, 3], [0.0, 1.0, 0.5]) == pytest.approx(0.5 + 1.0)  # level after the best
    assert area([1, 4, 3], [0.0, 1.0, 0.5]) == pytest.approx(0.5)  # nothing dearer than the last
    assert area([1, 0, 3], [0.0, 0.5, 0.5]) == pytest.approx(1.0)  # cheaper than the first


def test_groups_alone_say_nothing_within_groups() -> None:
    _, outcomes = sample()
    mean = {g: outcomes.gain[np.array(outcomes.groups) == g].mean() for g in set(outcomes.groups)}
    by_group = np.array([mean[g] for g in outcomes.groups])
    assert within_group_apgr(by_group, outcomes) == pytest.approx(0.5)
    assert apgr(by_group, outcomes) > 0.5


def test_within_one_group_it_is_the_whole() -> None:
    gain, outcomes = sample()
    one = outcomes_of(outcomes.weak, outcomes.strong, ["x"] * len(outcomes))
    assert within_group_apgr(gain, one) == pytest.approx(apgr(gain, outcomes))


def test_a_group_without_gain_counts_by_its_size() -> None:
    """It has an area of 0 whatever its order, and no gain is divided by."""
    gain, outcomes = sample(100)
    weak = np.concatenate([outcomes.weak, np.ones(50)])
    strong = np.concatenate([outcomes.strong, np.ones(50)])
    both = outcomes_of(weak, strong, ["a"] * 100 + ["b"] * 50)
    result = within_group_apgr(np.concatenate([gain, np.zeros(50)]), both)
    assert result == pytest.approx(apgr(gain, outcomes))


def test_without_gain_nothing_is_defined() -> None:
    for strong in ([0, 0], [1, 1]):
        outcomes = outcomes_of([1, 1], strong, ["a", "b"])
        for metric in (apgr, within_group_apgr, cpt):
            assert math.isnan(metric([1, 2], outcomes))


@pytest.mark.parametrize("metric", list(metrics.METRICS))
def test_bands_hold_their_value_and_agree_with_taking_the_rows(metric: str) -> None:
    gain, outcomes = sample(120)
    result = metrics.band(metric, gain, outcomes, resamples=40, seed=3)
    assert result.low <= result.value <= result.high
    plain: dict[str, Callable[..., float]] = {
        "apgr": apgr,
        "within_group_apgr": within_group_apgr,
        "aiq": aiq,
        "cpt50": cpt,
        "cpt80": lambda g, o: cpt(g, o, 0.8),
        "auc": metrics.auc,
    }
    assert result.value == pytest.approx(plain[metric](gain, outcomes))
    from pliant.stats import bootstrap

    slow = bootstrap(
        lambda rows: plain[metric](gain[rows], outcomes.select(rows)), 120, resamples=40, seed=3
    )
    assert result.as_dict() == pytest.approx(slow.as_dict())


def test_a_difference_is_paired() -> None:
    good, outcomes = sample(800, noise=1.0)
    poor = np.random.default_rng(5).normal(size=800)
    apart = metrics.difference("apgr", good, poor, outcomes, resamples=200)
    assert apart.low > 0 and apart.value == pytest.approx(
        apgr(good, outcomes) - apgr(poor, outcomes)
    )
    alike = metrics.difference("apgr", good, good * 2, outcomes, resamples=50)
    assert (alike.low, alike.high) == (0, 0)
    clustered = metrics.difference(
        "apgr", good, poor, outcomes, resamples=50, clusters=outcomes.groups
    )
    assert clustered.low <= clustered.value <= clustered.high


def test_a_curve_runs_from_the_weak_to_the_strong_model() -> None:
    gain, outcomes = sample()
    curve = quality_cost_curve(gain, outcomes, points=11, resamples=60)
    assert curve.share.tolist() == pytest.approx([i / 10 for i in range(11)])
    assert curve.quality[[0, -1]] == pytest.approx([outcomes.weak.mean(), outcomes.strong.mean()])
    assert curve.cost[[0, -1]] == pytest.approx(outcomes.cost.mean(axis=0))
    assert (curve.low <= curve.quality).all() and (curve.quality <= curve.high).all()
    order = np.argsort(-gain)[:90]  # at a share of 30 %
    routed = outcomes.weak.copy()
    routed[order] = outcomes.strong[order]
    assert curve.quality[3] == pytest.approx(routed.mean())


def test_many_models_on_one_curve() -> None:
    rng = np.random.default_rng(0)
    right = (rng.random((400, 3)) < [0.5, 0.7, 0.8]).astype(float)
    cost = np.tile([1.0, 2.0, 10.0], (400, 1))
    outcomes = Outcomes(tuple(map(str, range(400))), ("s", "m", "l"), right, cost)
    curve = lambda_curve(right, outcomes)
    assert curve.price[0] == 0 and curve.price[-1] == math.inf
    assert curve.quality[0] == right.max(axis=1).mean()  # ties went to the cheaper
    assert curve.cost[-1] == 1 and curve.shares[-1].tolist() == [1, 0, 0]
    assert (np.diff(curve.cost) <= 1e-12).all() and (np.diff(curve.quality) <= 1e-12).all()
    assert curve.shares.sum(axis=1) == pytest.approx(np.ones(len(curve.price)))
    assert curve.as_dict()["price"][-1] is None


def test_two_models_on_the_lambda_curve_lie_on_the_other() -> None:
    gain, outcomes = sample(200)
    flat = outcomes_of(outcomes.weak, outcomes.strong)
    value = np.stack([np.zeros(200), gain], axis=1)
    curve = lambda_curve(value, flat, points=40)
    at = quality_cost_curve(gain, flat, points=201, resamples=1)
    assert curve.quality == pytest.approx(np.interp(curve.cost, at.cost, at.quality))


def test_a_report_says_it_all_in_json() -> None:
    import json

    gain, outcomes = sample()
    result = metrics.report(gain, outcomes, score=-gain, resamples=30)
    content = json.loads(json.dumps(result.as_dict(), allow_nan=False))
    assert set(content["metrics"]) == {*metrics.METRICS, "lift"}
    assert content["metrics"]["apgr"]["value"] == pytest.approx(apgr(gain, outcomes))
    assert content["metrics"]["auc"]["value"] == pytest.approx(metrics.auc(-gain, outcomes))
    bare = outcomes_of(outcomes.weak, outcomes.strong)
    assert "within_group_apgr" not in metrics.report(gain, bare, resamples=5).metrics


@pytest.mark.parametrize("gain", [[1.0], [1.0, math.nan], [[1.0, 2.0]]])
def test_predictions_are_checked(gain: list[float]) -> None:
    outcomes = outcomes_of([0, 1], [1, 1])
    with pytest.raises(InvalidInput, match="one finite number for each of 2 prompts"):
        apgr(gain, outcomes)


def test_names_and_levels_are_checked() -> None:
    outcomes = outcomes_of([0, 1], [1, 1])
    with pytest.raises(InvalidInput, match="did you mean 'apgr'"):
        metrics.band("agpr", [1, 2], outcomes)
    with pytest.raises(InvalidInput, match="level=50"):
        cpt([1, 2], outcomes, 50)
    with pytest.raises(InvalidInput, match="no groups"):
        within_group_apgr([1, 2], outcomes)
    with pytest.raises(InvalidInput, match="value"):
        lambda_curve([1, 2], outcomes)
