"""One forward of a model, or of its first layers, that returns hidden states and a cache.

Two trials show whether a model supports its cache, and padding on the left.

Shapes: B prompts, T positions, r of them new, D features, V tokens of the vocabulary.
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
from pliant.anatomy.trial import is_close, trial_ids, verdict
from pliant.prefill.batch import Batch, positions

StepContext = Callable[[int, int, tuple[int, int]], AbstractContextManager[Any]]
"""`step_context(i, j, shape)` is entered around the forward of new positions i to j - 1."""


def no_context(start: int, stop: int, shape: tuple[int, int]) -> AbstractContextManager[Any]:
    return nullcontext()


@dataclass(frozen=True, eq=False)
class ForwardResult:
    """The hidden states and the cache of one forward."""

    hidden_BTD: Tensor | None
    """After the final norm; None for prompts that were joined from stored prefixes."""
    cache: Any
    name: str | None
    """The model's name for its cache; None if it has none."""
    logits_BV: Tensor | None = None
    """Of the last position."""
    first: FirstLayers | None = None
    """The first layers, to resume from, if the forward ended early."""
    output: Any = None
    """The model's own output, if its head has run."""

    @property
    def last_BD(self) -> Tensor | None:
        return None if self.hidden_BTD is None else self.hidden_BTD[:, -1]

    def new_BrD(self, new: int) -> Tensor:
        assert self.hidden_BTD is not None
        return self.hidden_BTD[:, -new:]


def run(anatomy: Anatomy, inputs: dict[str, Any], *, head: bool = False) -> ForwardResult:
    """Run all layers, and the head only if `head` is set."""
    if not head:
        decoded = run_decoder(anatomy, inputs)
        return ForwardResult(last_hidden_state(decoded), *cache_in(decoded))
    decoded, output = run_both(anatomy, inputs)
    # The cache is in the decoder's output or, if that is a tuple, in the model's.
    cache, name = cache_in(decoded if cache_name(decoded) else output)
    return ForwardResult(
        last_hidden_state(decoded), cache, name, output.logits[:, -1], output=output
    )


def cache_in(output: Any) -> tuple[Any, str | None]:
    """The cache in a model's output, and the model's name for it."""
    name = cache_name(output)
    return (None if name is None else getattr(output, name)), name


def run_layers(
    anatomy: Anatomy, layers: int | None, inputs: dict[str, Any], *, resumable: bool = False
) -> ForwardResult:
    """Run the first `layers`, or all (None); the former leave a cache in `inputs` unchanged."""
    if layers is None:
        return run(anatomy, inputs)
    first = run_first(anatomy, layers, resumable=resumable, **inputs)
    return ForwardResult(first.normed, first.cache, first.cache_name, first=first)


def inputs_of(anatomy: Anatomy, batch: Batch, new: int | None = None) -> dict[str, Any]:
    """The model's inputs for a batch, or for its last `new` positions on a cache.

    As in `generate`, positions follow from the mask, and there is no mask without padding.
    """
    ids, position_ids = batch.ids_BT, positions(batch.mask_BT)
    if new is not None:
        start = ids.shape[1] - new
        ids, position_ids = ids[:, start:], position_ids[:, start:]
    inputs: dict[str, Any] = {"input_ids": ids}
    if batch.is_ragged:
        inputs["attention_mask"] = batch.mask_BT
    if "position_ids" in _parameters(type(anatomy.model).forward):
        inputs["position_ids"] = position_ids
    return inputs


def on_top(
    anatomy: Anatomy,
    batch: Batch,
    ids_Br: Tensor,
    *,
    layers: int | None = None,
    step_context: StepContext = no_context,
    **inputs: Any,
) -> Tensor:
    """The hidden states of new positions, run with the prompts in one forward without a cache."""
    longer = extend(batch, ids_Br)
    kwargs = {**inputs_of(anatomy, longer), **inputs, "use_cache": False}
    new = ids_Br.shape[1]
    with step_context(0, new, (ids_Br.shape[0], longer.ids_BT.shape[1])):
        return run_layers(anatomy, layers, kwargs).new_BrD(new)


def on_cache(
    anatomy: Anatomy,
    batch: Batch,
    prompts: ForwardResult,
    ids_Br: Tensor,
    *,
    layers: int | None = None,
    step_context: StepContext = no_context,
    **inputs: Any,
) -> Tensor:
    """The hidden states of new positions, run on a copy of the prompts' cache.

    If the cache is written in place, one position runs at a time, since models read a recurrent
    state only then, and autograd saves copies of tensors that the next position overwrites.
    """
    assert prompts.name is not None
    at_once = ids_Br.shape[1] if only_attends(prompts.cache) else 1
    cache, hidden = prompts.cache, []
    for start in range(0, ids_Br.shape[1], at_once):
        batch = extend(batch, ids_Br[:, start : start + at_once])
        kwargs = {**inputs_of(anatomy, batch, at_once), **inputs, "use_cache": True}
        if has_no_positions(cache, prompts.name):
            kwargs.pop("attention_mask", None)
        kwargs[prompts.name] = cache if layers is not None else copy_state(cache)
        shape = (ids_Br.shape[0], at_once)
        with step_context(start, start + at_once, shape), _saving_copies(cache):
            step = run_layers(anatomy, layers, kwargs)
        cache = step.cache
        hidden.append(step.new_BrD(at_once))
    return torch.cat(hidden, dim=1)


def extend(batch: Batch, ids_Br: Tensor) -> Batch:
    """The batch with new positions behind its prompts."""
    ones = torch.ones_like(ids_Br, dtype=batch.mask_BT.dtype, device=batch.mask_BT.device)
    return Batch(torch.cat([batch.ids_BT, ids_Br], dim=1), torch.cat([batch.mask_BT, ones], dim=1))


def only_attends(cache: Any) -> bool:
    """Whether a cache holds keys and values alone, in layers that are never written in place."""
    layers = getattr(cache, "layers", None) or []
    return bool(layers) and all(type(layer).__name__ in ATTENDING for layer in layers)


ATTENDING = ("DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer")
"""By name, since older versions of transformers lack some of the classes."""


def has_no_positions(cache: Any, name: str) -> bool:
    """Whether a step needs no mask over the prompt, as with purely recurrent states."""
    if name != "past_key_values":
        return True
    layers = getattr(cache, "layers", None) or ()
    return bool(layers) and not any(hasattr(layer, "get_mask_sizes") for layer in layers)


def _saving_copies(cache: Any) -> AbstractContextManager[Any]:
    if not torch.is_grad_enabled() or only_attends(cache):
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t)


@functools.cache
def _parameters(forward: Callable[..., Any]) -> frozenset[str]:
    """A model class's inputs; patches of an instance's forward must accept the same."""
    return frozenset(inspect.signature(forward).parameters)


# --- trials ---------------------------------------------------------------------------------------

LENGTH, SHORTER, NEW = 61, 33, 2
"""Tokens. Sparse attention has to choose among so many, in the shorter prompt as well; a model with
a shorter context gets shorter prompts."""


def supports_cache(anatomy: Anatomy) -> bool:
    """Whether a step on the model's cache equals one forward over all positions."""
    return _try(anatomy, "cache", _step_equals_forward)


def supports_padding(anatomy: Anatomy) -> bool:
    """Whether a prompt with padding on the left has the same output as without."""
    return _try(anatomy, "padding on the left", _padding_is_harmless)


def groups(anatomy: Anatomy, batch: Batch) -> list[list[int] | None]:
    """The rows that may run together: all of them (None), or the rows of each length if the model
    does not support padding. An empty prompt would be padding alone, so it never runs with others.
    """
    if not batch.is_ragged:
        return [None]
    if not supports_padding(anatomy):
        return list(batch.by_length())
    empty = [row for row, length in enumerate(batch.lengths) if not length]
    if not empty:
        return [None]
    return [[row for row, length in enumerate(batch.lengths) if length], empty]


def _try(anatomy: Anatomy, question: str, ask: Callable[[Anatomy], bool]) -> bool:
    """A model that raises an error supports neither."""
    return verdict(
        anatomy.model, question, lambda: ask(anatomy), lambda reason: False, in_eval_mode=True
    )


def _step_equals_forward(anatomy: Anatomy) -> bool:
    batch, new = _trial(anatomy)
    expected = on_top(anatomy, batch, new)
    result = run(anatomy, {**inputs_of(anatomy, batch), "use_cache": True})
    if result.cache is None:
        return False
    return is_close(anatomy.model, on_cache(anatomy, batch, result, new), expected)


def _padding_is_harmless(anatomy: Anatomy) -> bool:
    """Tried without the cache and, if it is supported, with it: GIT's mask is right without it
    only."""
    batch, new = _trial(anatomy)
    mask, length = batch.mask_BT.clone(), batch.mask_BT.shape[1]
    mask[1, : length - length * SHORTER // LENGTH] = 0
    padded = Batch(batch.ids_BT, mask)
    alone = on_top(anatomy, padded.select([1]), new[1:])
    if not is_close(anatomy.model, on_top(anatomy, padded, new)[1:], alone):
        return False
    if not supports_cache(anatomy):
        return True
    result = run(anatomy, {**inputs_of(anatomy, padded), "use_cache": True})
    return is_close(anatomy.model, on_cache(anatomy, padded, result, new)[1:], alone)


def _trial(anatomy: Anatomy) -> tuple[Batch, Tensor]:
    """Two prompts, and the positions that follow them."""
    longest = int(getattr(anatomy.config, "max_position_embeddings", 0) or LENGTH + NEW)
    length = max(1, min(LENGTH, longest - NEW))
    ids = trial_ids(anatomy, length + NEW)
    return Batch(ids[:, :length], torch.ones_like(ids[:, :length])), ids[:, length:]
