"""Copies of caches and other states, which can be written to without changing the original.

A copy shares keys and values that only grow by concatenation, so copying the cache of a long prompt
costs next to nothing. Tensors that are written in place are copied.
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
"""These classes, but not their subclasses, never write into their tensors."""

OPAQUE = (torch.nn.Module, PreTrainedConfig, type, torch.dtype, torch.device, torch.Stream)


def copy_state(state: State) -> State:
    """An independent copy of `state`, any nest of caches, lists, dicts and tensors."""
    return _copy(state, written_in_place=False, memo={})


def is_state(value: Any) -> bool:
    """Whether a layer could write into `value` for later layers to read."""
    if isinstance(value, (torch.Tensor, tuple, *OPAQUE)) or callable(value):
        return False
    return isinstance(value, (list, dict)) or hasattr(value, "__dict__")


def restore_state(live: Any, saved: Any) -> None:
    """Replace the contents of `live` by a copy of those of `saved`, a state of the same kind."""
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
    """`memo` maps the id of each original to it and its copy, so that copies are shared alike."""
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
