"""One forward over a model, or over its first layers, that yields hidden states and a cache.

The head is left out unless its logits are wanted. B prompts, T positions,
r of them new, D features.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pliant.anatomy import Anatomy
from pliant.anatomy.cache_copy import copy_state
from pliant.anatomy.decoder import last_hidden_state, run_both, run_decoder
from pliant.anatomy.depth import FirstLayers, cache_name, run_first
from pliant.prefill.batch import Batch, positions

Entering = Callable[[int, int, tuple[int, int]], AbstractContextManager[Any]]
"""Entered around the forward that runs new positions i to j - 1, of a batch of this shape."""


def unnoticed(start: int, stop: int, shape: tuple[int, int]) -> AbstractContextManager[Any]:
    return nullcontext()


@dataclass(frozen=True, eq=False)
class Ran:
    """What one forward gave."""

    hidden_BTD: Tensor | None
    """After the final norm; None of prompts that were read back."""
    cache: Any
    name: str | None
    """What the model calls its cache; None where there is none."""
    logits_BV: Tensor | None = None
    """Of the last position."""
    first: FirstLayers | None = None
    """For resuming, where the forward ended early."""

    @property
    def last_BD(self) -> Tensor | None:
        return None if self.hidden_BTD is None else self.hidden_BTD[:, -1]

    def new_BrD(self, new: int) -> Tensor:
        assert self.hidden_BTD is not None
        return self.hidden_BTD[:, -new:]


def run(anatomy: Anatomy, inputs: dict[str, Any], *, head: bool = False) -> Ran:
    """The whole model; it is stopped before its head unless that is asked for."""
    if not head:
        decoded = run_decoder(anatomy, inputs)
        return Ran(last_hidden_state(decoded), *_cache_in(decoded))
    decoded, output = run_both(anatomy, inputs)
    # The decoder's output has the cache, or else (where it is a tuple) the model's.
    cache, name = _cache_in(decoded if cache_name(decoded) else output)
    return Ran(last_hidden_state(decoded), cache, name, output.logits[:, -1])


def _cache_in(output: Any) -> tuple[Any, str | None]:
    name = cache_name(output)
    return (None if name is None else getattr(output, name)), name


def run_layers(anatomy: Anatomy, k: int, inputs: dict[str, Any], *, resumable: bool) -> Ran:
    """The first k layers; a cache among the inputs is left as it was."""
    first = run_first(anatomy, k, resumable=resumable, **inputs)
    return Ran(first.normed, first.cache, first.cache_name, first=first)


def inputs_of(anatomy: Anatomy, batch: Batch, new: int | None = None) -> dict[str, Any]:
    """What the model is given for a batch, or for its last `new` positions on a cache.

    As `generate` does it: positions from the mask, and no mask where nothing is padded.
    """
    ids, where = batch.ids_BT, positions(batch.mask_BT)
    if new is not None:
        ids, where = ids[:, ids.shape[1] - new :], where[:, where.shape[1] - new :]
    inputs: dict[str, Any] = {"input_ids": ids}
    if batch.is_ragged:
        inputs["attention_mask"] = batch.mask_BT
    if _takes(anatomy, "position_ids"):
        inputs["position_ids"] = where
    return inputs


def on_top(
    anatomy: Anatomy,
    batch: Batch,
    ids_Br: Tensor,
    *,
    layers: int | None = None,
    entering: Entering = unnoticed,
    **inputs: Any,
) -> Tensor:
    """Prompts and new positions in one forward, without a cache: the new ones' hidden states."""
    longer = extended(batch, ids_Br)
    given = {**inputs_of(anatomy, longer), **inputs, "use_cache": False}
    new = ids_Br.shape[1]
    with entering(0, new, (ids_Br.shape[0], longer.ids_BT.shape[1])):
        if layers is None:
            ran = run(anatomy, given)
        else:
            ran = run_layers(anatomy, layers, given, resumable=False)
    return ran.new_BrD(new)


def on_cache(
    anatomy: Anatomy,
    batch: Batch,
    ran: Ran,
    ids_Br: Tensor,
    *,
    layers: int | None = None,
    entering: Entering = unnoticed,
    **inputs: Any,
) -> Tensor:
    """New positions on a branch of a cache, which stays as it was: their hidden states.

    A cache that is written in place is stepped one position at a time: of a recurrent state,
    models make use only so. And what autograd keeps is copied, for the next step writes over it.
    """
    assert ran.name is not None
    at_once = ids_Br.shape[1] if only_attends(ran.cache) else 1
    cache, found = ran.cache, []
    for start in range(0, ids_Br.shape[1], at_once):
        batch = extended(batch, ids_Br[:, start : start + at_once])
        given = {**inputs_of(anatomy, batch, at_once), **inputs, "use_cache": True}
        if remembers_no_positions(cache, ran.name):
            given.pop("attention_mask", None)
        given[ran.name] = cache if layers is not None else copy_state(cache)
        shape = (ids_Br.shape[0], at_once)
        with entering(start, start + at_once, shape), _kept_for_autograd(cache):
            if layers is None:
                step = run(anatomy, given)
            else:
                step = run_layers(anatomy, layers, given, resumable=False)
        cache = step.cache
        found.append(step.new_BrD(at_once))
    return torch.cat(found, dim=1)


def extended(batch: Batch, ids_Br: Tensor) -> Batch:
    ones = torch.ones_like(ids_Br)
    return Batch(
        torch.cat([batch.ids_BT, ids_Br], dim=1),
        torch.cat([batch.mask_BT, ones.to(batch.mask_BT)], dim=1),
    )


def only_attends(cache: Any) -> bool:
    """Whether a cache is keys and values alone, of the kinds that are never written in place."""
    layers = getattr(cache, "layers", None) or []
    return bool(layers) and all(type(layer).__name__ in ATTENDING for layer in layers)


ATTENDING = ("DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer")
"""By name: older transformers lack some of the classes."""


def remembers_no_positions(cache: Any, name: str) -> bool:
    """Whether a step needs no mask over what came before: of purely recurrent states, none does."""
    if name != "past_key_values":
        return True
    layers = getattr(cache, "layers", None) or ()
    return bool(layers) and not any(hasattr(layer, "get_mask_sizes") for layer in layers)


def _kept_for_autograd(cache: Any) -> AbstractContextManager[Any]:
    if not torch.is_grad_enabled() or only_attends(cache):
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t)


def _takes(anatomy: Anatomy, name: str) -> bool:
    return name in _parameters(type(anatomy.model).forward)


@functools.cache
def _parameters(forward: Callable[..., Any]) -> frozenset[str]:
    """What a kind of model takes; whoever patches a model's forward must let that through."""
    return frozenset(inspect.signature(forward).parameters)
