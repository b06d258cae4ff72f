"""A branch can be written to without a trace on the trunk, and costs no copy it can do without."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.cache_utils import DynamicCache, LinearAttentionLayer, StaticLayer

from pliant.anatomy.cache_copy import copy_state, is_state, restore_state

leaves = st.none() | st.integers() | st.text(max_size=3) | st.builds(torch.zeros, st.just(2))
nests = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=2), inner, max_size=3)
        | st.tuples(inner, inner)
        | st.builds(lambda value: UserDict(inner=value), inner)
    ),
    max_leaves=8,
)


def plain(value: Any) -> Any:
    """The contents without identity, so that == compares them."""
    if isinstance(value, torch.Tensor):
        return ("tensor", value.tolist())
    if isinstance(value, (list, tuple)):
        return [type(value).__name__, *map(plain, value)]
    if isinstance(value, (dict, UserDict)):
        return {key: plain(part) for key, part in value.items()}
    return value


def scribble(value: Any) -> None:
    """Change every container there is."""
    parts = list(value.values()) if isinstance(value, (dict, UserDict)) else value
    if isinstance(value, (list, tuple, dict, UserDict)):
        for part in parts:
            scribble(part)
    if isinstance(value, list):
        value.append("scribble")
    elif isinstance(value, (dict, UserDict)):
        value["scribble"] = "scribble"


@given(nests)
def test_a_branch_equals_its_trunk_and_goes_its_own_way(trunk: Any) -> None:
    before = plain(trunk)
    copied = copy_state(trunk)
    assert plain(copied) == before
    scribble(copied)
    assert plain(trunk) == before


@given(nests.filter(is_state))
def test_restoring_gives_the_contents_back_as_often_as_it_is_asked(trunk: Any) -> None:
    before, saved = plain(trunk), copy_state(trunk)
    for _ in range(2):
        scribble(trunk)
        restore_state(trunk, saved)
        assert plain(trunk) == before


def test_growing_keys_are_shared_until_one_side_grows() -> None:
    trunk = DynamicCache()
    trunk.update(torch.ones(1, 1, 3, 2), torch.ones(1, 1, 3, 2), 0)
    twig = copy_state(trunk)
    assert twig.layers[0].keys is trunk.layers[0].keys
    twig.update(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2), 0)
    assert (trunk.get_seq_length(), twig.get_seq_length()) == (3, 4)


@pytest.mark.parametrize("in_place", ["linear", "static"])
def test_states_that_are_written_in_place_are_copied(in_place: str) -> None:
    trunk = LinearAttentionLayer() if in_place == "linear" else StaticLayer(max_cache_len=4)
    if in_place == "linear":
        trunk.update_recurrent_state(torch.ones(1, 2))
        twig = copy_state(trunk)
        twig.update_recurrent_state(torch.zeros(1, 2))
        assert trunk.recurrent_states[0].eq(1).all()
    else:
        trunk.update(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2))
        twig = copy_state(trunk)
        twig.update(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2))
        assert trunk.keys.sum() == 4
        assert twig.keys.sum() == 8


def test_what_is_one_object_stays_one_object() -> None:
    inner = [1]
    one, other = copy_state((inner, inner))
    assert one is other is not inner


def test_modules_tensors_and_functions_are_no_state() -> None:
    for value in (nn.Linear(1, 1), torch.zeros(1), print, (1, 2), None, 3, "text", torch.float32):
        assert not is_state(value)
        assert copy_state(value) is value


def test_gradients_flow_through_a_branch() -> None:
    leaf = torch.ones(2, requires_grad=True)
    (copy_state([leaf * 2])[0].sum()).backward()
    assert leaf.grad is not None and leaf.grad.eq(2).all()
