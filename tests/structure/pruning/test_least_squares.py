"""Removing units from a projection: the weights that stay are the best there are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pliant.structure.pruning.least_squares import Statistics, remove_units

FEATURES, OUTPUTS, TOKENS = 12, 5, 200


def problem(seed: int = 0) -> tuple[Tensor, Tensor, Statistics]:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(FEATURES, FEATURES, generator=generator)
    x_NF = torch.randn(TOKENS, FEATURES, generator=generator) @ mixing
    weight_OF = torch.randn(OUTPUTS, FEATURES, generator=generator)
    statistics = Statistics.empty(FEATURES, OUTPUTS, torch.device("cpu"))
    statistics.add(x_NF[:50], x_NF[:50] @ weight_OF.T)
    statistics.add(x_NF[50:], x_NF[50:] @ weight_OF.T)
    return x_NF, weight_OF, statistics


def lost(x_NF: Tensor, weight_OF: Tensor, new_OF: Tensor) -> float:
    return float((x_NF @ (new_OF - weight_OF).T).square().sum())


@pytest.mark.parametrize("width", [1, 3])
def test_the_new_weights_are_those_of_least_squares(width: int) -> None:
    x, weight, statistics = problem()
    removal = remove_units(statistics, 2, width=width, damping=1e-9)
    gone = {u * width + i for u in removal.removed.tolist() for i in range(width)}
    kept = [f for f in range(FEATURES) if f not in gone]
    expected = torch.linalg.lstsq(x[:, kept].double(), (x @ weight.T).double()).solution.T
    assert torch.allclose(removal.weight_OF[:, kept].double(), expected, atol=1e-3)
    assert not removal.weight_OF[:, sorted(gone)].any()


@pytest.mark.parametrize("width", [1, 2])
def test_the_first_to_go_is_the_one_whose_loss_costs_least(width: int) -> None:
    x, weight, statistics = problem(1)
    units = FEATURES // width
    costs = []
    for unit in range(units):
        order = torch.tensor([unit])
        new = remove_units(statistics, 1, width=width, damping=1e-9, order=order).weight_OF
        costs.append(lost(x, weight, new))
    removal = remove_units(statistics, 1, width=width, damping=1e-9)
    assert int(removal.removed[0]) == min(range(units), key=costs.__getitem__)


def test_a_unit_that_repeats_another_goes_without_a_loss() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(TOKENS, FEATURES, generator=generator)
    x[:, 7] = 2 * x[:, 3]
    weight = torch.randn(OUTPUTS, FEATURES, generator=generator)
    statistics = Statistics.empty(FEATURES, OUTPUTS, torch.device("cpu"))
    statistics.add(x, x @ weight.T)
    removal = remove_units(statistics, 1, damping=1e-6)
    assert int(removal.removed[0]) in (3, 7)
    assert lost(x, weight, removal.weight_OF) < 1e-4 * float((x @ weight.T).square().sum())


def test_no_unit_goes_twice_and_all_are_different() -> None:
    _, _, statistics = problem(3)
    removed = remove_units(statistics, FEATURES - 1).removed.tolist()
    assert len(set(removed)) == FEATURES - 1


def test_strong_damping_keeps_the_old_weights_of_what_stays() -> None:
    _, weight, statistics = problem(4)
    removal = remove_units(statistics, 3, damping=1e9, prior_OF=weight)
    kept = [f for f in range(FEATURES) if f not in removal.removed.tolist()]
    assert torch.allclose(removal.weight_OF[:, kept], weight[:, kept], atol=1e-3)


def test_the_error_is_the_share_of_the_output_that_is_lost() -> None:
    x, weight, statistics = problem(5)
    new = remove_units(statistics, 4).weight_OF
    expected = lost(x, weight, new) / float((x @ weight.T).square().sum())
    assert statistics.error(new, weight) == pytest.approx(expected, rel=1e-3)
    assert statistics.error(weight, weight) == 0
