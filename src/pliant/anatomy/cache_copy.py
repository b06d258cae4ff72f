"""Branch a running state (a cache, a side state): writing to the branch leaves the trunk alone.

Keys and values that only ever grow by concatenation are shared with the branch, so that branching
a long prompt's cache costs next to nothing; every state that is written in place is copied.
"""

from __future__ import annotations

import copy
from collections import UserDict
from typing import Any, TypeVar

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

State = TypeVar("State")

REPLACES_ITS_TENSORS = (DynamicLayer, DynamicSlidingWindowLayer, UserDict)
"""Exactly these classes (a subclass may do otherwise) never write into a tensor they hold."""

OPAQUE = (torch.nn.Module, PreTrainedConfig, type, torch.dtype, torch.device, torch.Stream)


def copy_state(state: State) -> State:
    """A copy of `state` (any nest of caches, lists, dicts and tensors) that can go its own way."""
    return _copy(state, written_in_place=False, memo={})


def is_state(value: Any) -> bool:
    """Whether a layer could leave something behind in `value` for the layers after it."""
    if isinstance(value, (torch.Tensor, tuple, *OPAQUE)) or callable(value):
        return False
    return isinstance(value, (list, dict)) or hasattr(value, "__dict__")


def restore_state(live: Any, saved: Any) -> None:
    """Give `live` the contents of `saved`, which is of its kind and can be used again."""
    fresh = copy_state(saved)
    if isinstance(live, list):
        live[:] = fresh
    elif isinstance(live, dict):
        live.clear()
        live.update(fresh)
    else:
        vars(live).clear()
        vars(live).update(vars(fresh))


def _copy(value: Any, written_in_place: bool, memo: dict[int, tuple[Any, Any]]) -> Any:
    """`memo` holds each original with its copy: what is shared before is shared after."""
    if isinstance(value, torch.Tensor) and not written_in_place:
        return value
    if not isinstance(value, (torch.Tensor, tuple)) and not is_state(value):
        return value
    if id(value) not in memo:
        memo[id(value)] = (value, _copied(value, written_in_place, memo))
    return memo[id(value)][1]


def _copied(value: Any, written_in_place: bool, memo: dict[int, tuple[Any, Any]]) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, tuple):
        parts = [_copy(part, written_in_place, memo) for part in value]
        if all(part is old for part, old in zip(parts, value, strict=True)):
            return value
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, list):
        return [_copy(part, True, memo) for part in value]
    fresh = copy.copy(value)
    contents = fresh if isinstance(value, dict) else vars(fresh)
    if not isinstance(value, dict):
        written_in_place = type(value) not in REPLACES_ITS_TENSORS
    for key, part in list(contents.items()):
        contents[key] = _copy(part, written_in_place, memo)
    return fresh
