"""The cross-entropy method: it finds the best, whatever the order, and ties share the elite."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pliant.errors import InvalidInput
from pliant.experts.adapting.cem import CEMConfig, Scores, elite_weights, search
from pliant.experts.facade.interpolation import compute_cem_interpolation

PAIRS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=12)


def towards(target: list[float]) -> Any:
    return lambda candidates: Scores(-((candidates - np.array(target)) ** 2).sum(1))


class TestElite:
    @given(PAIRS, st.integers(1, 12), st.randoms())
    def test_the_order_of_candidates_is_nothing(self, pairs: Any, count: int, rng: Any) -> None:
        first, second = (np.array(column, dtype=float) for column in zip(*pairs, strict=True))
        weight = elite_weights(first, second, count)
        order = list(range(len(pairs)))
        rng.shuffle(order)
        assert np.allclose(elite_weights(first[order], second[order], count), weight[order])

    @given(PAIRS, st.integers(1, 12))
    def test_weights_fill_the_elite_from_the_best(self, pairs: Any, count: int) -> None:
        first, second = (np.array(column, dtype=float) for column in zip(*pairs, strict=True))
        weight = elite_weights(first, second, count)
        assert weight.sum() == pytest.approx(min(count, len(pairs)))
        assert weight.min() >= 0 and weight.max() <= 1
        for i, a in enumerate(pairs):
            for j, b in enumerate(pairs):
                if a > b:
                    assert weight[i] >= weight[j]
                    assert weight[i] == 1 or weight[j] == 0
                if a == b:
                    assert weight[i] == weight[j]


class TestSearch:
    def test_it_finds_a_maximum_outside_of_0_and_1(self) -> None:
        config = CEMConfig(iterations=25, l1=0, least_std=0.01)
        result = search(towards([1.6, -0.4]), 2, config)
        assert np.allclose(result.best, [1.6, -0.4], atol=0.05)
        assert result.start_value == pytest.approx(-(1.6**2) - 0.4**2)
        assert len(result.history) == 25

    @given(st.integers(0, 5))
    def test_it_is_no_worse_than_what_is_known(self, seed: int) -> None:
        config = CEMConfig(iterations=1, population=4, l1=0, seed=seed)
        result = search(towards([3.0, 3.0]), 2, config, known=[[3.0, 3.0]])
        assert result.best == (3.0, 3.0)

    def test_the_penalty_leaves_out_what_does_not_help(self) -> None:
        config = CEMConfig(iterations=25, l1=0.05, least_std=0.01)
        result = search(lambda c: Scores(-((c[:, 0] - 1) ** 2)), 2, config)
        assert abs(result.best[1]) < 0.06
        assert result.best[0] == pytest.approx(1, abs=0.08)

    def test_where_all_are_equal_nothing_is_chosen(self) -> None:
        result = search(lambda c: Scores(np.ones(len(c))), 3)
        assert result.best == (0.0, 0.0, 0.0)

    def test_likelihood_decides_between_equal_rewards(self) -> None:
        def score(candidates: Any) -> Scores:
            return Scores((candidates[:, 0] > 0.5).astype(float), -(candidates[:, 1] ** 2))

        result = search(score, 2, CEMConfig(iterations=20, least_std=0.01))
        assert result.value == 1
        assert abs(result.best[1]) < 0.05

    def test_a_score_that_is_no_number_is_the_worst(self) -> None:
        def score(candidates: Any) -> Scores:
            return Scores(np.where(candidates[:, 0] > 0, np.nan, candidates[:, 0]))

        assert search(score, 1, CEMConfig(l1=0)).best == (0.0,)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"population": 1}, "population = 1"),
            ({"iterations": 0}, "iterations = 0"),
            ({"elite_share": 0.0}, "elite_share = 0.0"),
            ({"l1": -1.0}, "l1 = -1.0"),
            ({"std": float("nan")}, "std = nan"),
        ],
    )
    def test_bad_settings_are_refused(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(InvalidInput, match=message):
            CEMConfig(**options)

    def test_a_start_must_fit(self) -> None:
        with pytest.raises(InvalidInput, match="start has 3 numbers, and a candidate has 2"):
            search(towards([0.0, 0.0]), 2, start=[0, 0, 0])


class TestSeed:
    """`compute_cem_interpolation`, by its old name."""

    Z = {
        "math": {"a": torch.tensor([2.0, 1.0]), "b": torch.tensor([1.0])},
        "code": {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0])},
    }

    def test_it_mixes_changes(self) -> None:
        target = {"a": torch.tensor([1.7, 0.8]), "b": torch.tensor([0.6])}
        result = compute_cem_interpolation(
            self.Z,
            lambda z: -sum(float((z[k] - target[k]).square().sum()) for k in z),
            iterations=30,
        )
        assert result.alphas == pytest.approx({"math": 0.7, "code": -0.2}, abs=0.05)
        assert result.z["a"].tolist() == pytest.approx(
            [1 + result.alphas["math"], 1 + result.alphas["code"]]
        )
        assert result.score > result.base_score
        assert "math - 0." in str(result)

    def test_bare_tensors_stay_bare(self) -> None:
        z = {name: own["a"] for name, own in self.Z.items()}
        result = compute_cem_interpolation(z, lambda z: float(-z.sum()), iterations=2)
        assert isinstance(result.z, torch.Tensor)

    def test_vectors_of_other_shapes_are_refused(self) -> None:
        with pytest.raises(InvalidInput, match="experts of different bases cannot be mixed"):
            compute_cem_interpolation({"a": torch.ones(2), "b": torch.ones(3)}, float)
        with pytest.raises(InvalidInput, match="no z-vectors"):
            compute_cem_interpolation({}, float)
