"""Writing to a copy leaves the original unchanged, and a copy copies no more than it must."""

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
def test_a_copy_equals_its_original_and_is_independent(original: Any) -> None:
    before = plain(original)
    copied = copy_state(original)
    assert plain(copied) == before
    scribble(copied)
    assert plain(original) == before


@given(nests.filter(is_state))
def test_a_state_can_be_restored_again_and_again(original: Any) -> None:
    before, saved = plain(original), copy_state(original)
    for _ in range(2):
        scribble(original)
        restore_state(original, saved)
        assert plain(original) == before


def test_growing_keys_are_shared_until_one_side_grows() -> None:
    original = DynamicCache()
    original.update(torch.ones(1, 1, 3, 2), torch.ones(1, 1, 3, 2), 0)
    twig = copy_state(original)
    assert twig.layers[0].keys is original.layers[0].keys
    twig.update(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2), 0)
    assert (original.get_seq_length(), twig.get_seq_length()) == (3, 4)


@pytest.mark.parametrize("in_place", ["linear", "static"])
def test_states_that_are_written_in_place_are_copied(in_place: str) -> None:
    original = LinearAttentionLayer() if in_place == "linear" else StaticLayer(max_cache_len=4)
    if in_place == "linear":
        original.update_recurrent_state(torch.ones(1, 2))
        twig = copy_state(original)
        twig.update_recurrent_state(torch.zeros(1, 2))
        assert original.recurrent_states[0].eq(1).all()
    else:
        original.update(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2))
        twig = copy_state(original)
        twig.update(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2))
        assert original.keys.sum() == 4
        assert twig.keys.sum() == 8


def test_shared_objects_stay_shared() -> None:
    inner = [1]
    one, other = copy_state((inner, inner))
    assert one is other is not inner


def test_modules_tensors_and_functions_are_no_state() -> None:
    for value in (nn.Linear(1, 1), torch.zeros(1), print, (1, 2), None, 3, "text", torch.float32):
        assert not is_state(value)
        assert copy_state(value) is value


def test_gradients_flow_through_a_copy() -> None:
    leaf = torch.ones(2, requires_grad=True)
    (copy_state([leaf * 2])[0].sum()).backward()
    assert leaf.grad is not None and leaf.grad.eq(2).all()
