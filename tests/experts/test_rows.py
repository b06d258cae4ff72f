"""The algebra of mixtures: a row's change is a sum of its experts' changes, in every layer."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from pliant.experts import Rows

NAMES = ("math", "code", "law")
COEFFICIENT = st.floats(-2, 2, width=32)
MIXTURE = st.dictionaries(st.sampled_from(NAMES), COEFFICIENT, max_size=3)
MIXTURES = st.lists(MIXTURE, min_size=1, max_size=5)
CHANGES = {
    name: torch.randn(shape, generator=torch.Generator().manual_seed(i))
    for i, (name, shape) in enumerate(zip(NAMES, (4, 4, 3), strict=True))
}


def change(mixtures: Any, layer: int | None = 0) -> torch.Tensor:
    return Rows.of_mixtures(mixtures, NAMES).change(CHANGES, (4,), layer)


def times(mixture: Any, factor: float) -> dict[str, float]:
    return {name: factor * a for name, a in mixture.items()}


def plus(one: Any, other: Any) -> dict[str, float]:
    return {name: one.get(name, 0) + other.get(name, 0) for name in {**one, **other}}


@given(MIXTURE, MIXTURE, COEFFICIENT)
def test_a_mixtures_change_is_linear(one: Any, other: Any, factor: float) -> None:
    a, b, both, scaled = change([one, other, plus(one, other), times(one, factor)])
    assert torch.allclose(both, a + b, atol=1e-5)
    assert torch.allclose(scaled, factor * a, atol=1e-5)


@given(MIXTURES)
def test_rows_do_not_meet(mixtures: Any) -> None:
    together = change(mixtures)
    alone = [change([mixture])[0] for mixture in mixtures]
    assert torch.allclose(together, torch.stack(alone), atol=1e-5)
    zeros = [dict.fromkeys(mixture, 0.0) for mixture in mixtures]
    assert not change(zeros).any()


@given(MIXTURES, st.integers(1, 4))
def test_the_same_coefficient_in_every_layer_is_one_for_all(mixtures: Any, depth: int) -> None:
    by_layer = [{name: [a] * depth for name, a in m.items()} for m in mixtures]
    for layer in (*range(depth), None):
        assert torch.allclose(change(by_layer, layer), change(mixtures), atol=1e-6)


@given(MIXTURES)
def test_groups_are_the_rows_with_equal_mixtures(mixtures: Any) -> None:
    rows = Rows.of_mixtures(mixtures, NAMES)
    groups = rows.groups(NAMES, 0)
    members = sorted(int(row) for rows_of, _ in groups for row in rows_of)
    assert members == list(range(len(mixtures)))
    kinds = [{name: a for name, a in mixture.items() if a} for mixture in mixtures]
    for rows_of, mixture in groups:
        for row in rows_of:
            assert {name: float(a) for name, a in mixture.items()} == kinds[int(row)]
    assert len(groups) == len({tuple(sorted(kind.items())) for kind in kinds})
