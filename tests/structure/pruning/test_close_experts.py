"""The experts that a score ranks lowest are closed, as many in every layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.structure.models import IDS, logits, same_bits
from tests.structure.pruning.test_remaining_experts import grouped

from pliant.anatomy.tiny import tiny_model
from pliant.errors import InvalidInput, UnsupportedModel
from pliant.structure import ImportanceConfig, close_experts, importance

BATCHES = [{"input_ids": IDS}]


@pytest.mark.parametrize("score", ["relative_activation", "activation", "frequency", "magnitude"])
def test_the_lowest_go(score: Any) -> None:
    model = tiny_model("mixtral")
    scores = importance(model, BATCHES, ImportanceConfig(("experts",), score))
    lowest = scores.lowest("experts", 0.5, uniform=True)
    closed = close_experts(model, BATCHES, 0.5, score)
    assert closed.removed == {key: tuple(units) for key, units in lowest.items()}
    assert str(closed) == f"8 of 16 experts closed by {score}, 2 in each of 4 layers"
    assert closed.as_dict()["removed"]["0"] == list(closed.removed["0"])


def test_it_acts_and_comes_off() -> None:
    model = tiny_model("mixtral")
    before = logits(model)
    closed = close_experts(model, BATCHES, 0.25)
    assert not torch.allclose(logits(model), before, atol=1e-5)
    closed.detach()
    assert same_bits(logits(model), before)


def test_random_depends_on_the_seed() -> None:
    removed = []
    for seed in (0, 0, 1):
        closed = close_experts(tiny_model("mixtral"), [], 0.5, "random", seed=seed)
        removed.append(closed.removed)
    assert removed[0] == removed[1] != removed[2]


def test_each_group_loses_as_many() -> None:
    model = grouped()
    closed = close_experts(model, BATCHES, 0.25)
    for units in closed.removed.values():
        assert sorted(unit // 4 for unit in units) == [0, 1]


def test_groups_must_stay_equal() -> None:
    with pytest.raises(InvalidInput, match="1 of 8 experts are to go.* remove a multiple of 2"):
        close_experts(grouped(), BATCHES, 0.125)


@pytest.mark.parametrize("share", [0, 1, -0.5, 0.01, True, "half"])
def test_a_share_that_removes_nothing_or_everything(share: Any) -> None:
    with pytest.raises(InvalidInput, match="share = "):
        close_experts(tiny_model("mixtral"), BATCHES, share)


def test_a_model_without_a_mixture() -> None:
    with pytest.raises(UnsupportedModel, match="no experts to gate"):
        close_experts(tiny_model("llama"), BATCHES, 0.5)
