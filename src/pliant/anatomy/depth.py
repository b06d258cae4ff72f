"""Run only a model's first k layers and, later, the remaining ones.

    first = run_first(model, 8, input_ids=ids)   # layers 8, 9, ... and the head are not computed
    score = probe(first.normed[:, -1])
    output = first.resume()                      # layers 0-7 are not computed again

The model's own forward runs, with its own masks, positions, caches and side states. Layers after
the first k pass the hidden state through unchanged, the decoder ends as it always does (final norm,
projection, merging of its streams), and the model is stopped before the head. `resume` runs the
same forward again, with the stored outputs of the first k layers.

`prove_depth` checks on a model that this gives the model's own bits.

Left out: k = 0 (see `anatomy.embeddings`), and models that do not run each layer once and in order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pliant.anatomy.anatomy import Anatomy
from pliant.anatomy.cache_copy import copy_state, is_state, restore_state
from pliant.anatomy.decoder import (
    Stopped,
    last_hidden_state,
    no_decoder_call,
    run_both,
    run_decoder,
)
from pliant.anatomy.intercept import CALL, FORWARD, Handler, Target, intercept
from pliant.errors import InvalidInput, UnsupportedModel

CACHE_NAMES = ("past_key_values", "cache_params", "state", "mems", "past_buckets_states")
"""What models call their caches: attention, recurrent models, RWKV, XLNet, Reformer."""


def run_first(
    model: nn.Module | Anatomy, k: int, *, resumable: bool = True, **inputs: Any
) -> FirstLayers:
    """Run layers 0 to k - 1 on `inputs`, the keyword arguments of `model(...)`.

    A cache among them is not written to: the new entries are in the result. With `resumable=False`
    the result has only the hidden states and the cache, for example for training.
    """
    anatomy = model if isinstance(model, Anatomy) else Anatomy.of(model)
    _check_depth(anatomy, k)
    if resumable:
        _check_inputs(anatomy, inputs)
        inputs = copy_state(inputs)
    walk = _FirstWalk(anatomy, k, resumable)
    try:
        with intercept(walk.handlers()):
            anatomy.model(**copy_state(inputs))
    except Stopped as stopped:
        normed, name = last_hidden_state(stopped.output), cache_name(stopped.output)
        cache = getattr(stopped.output, name) if name else None
    else:
        raise no_decoder_call(anatomy)
    hidden = normed if walk.hidden is None else walk.hidden
    memory = _Memory(anatomy, inputs, walk.outputs, walk.states or ()) if resumable else None
    return FirstLayers(k, hidden, normed, name, cache, memory)


@dataclass(frozen=True, eq=False)
class FirstLayers:
    """The output of a model's first `k` layers."""

    k: int
    hidden: Tensor
    """The input of the model's final norm (the same as `normed` in a model without one)."""
    normed: Tensor
    """The decoder's last hidden state, as if the model ended after layer k."""
    cache_name: str | None
    """The model's name for its cache, in its inputs and outputs; None without a cache."""
    _cache: Any = field(repr=False)
    _memory: _Memory | None = field(repr=False)

    @property
    def cache(self) -> Any:
        """A new copy of the first k layers' cache, for another `run_first`; None without
        `use_cache`. It has no entries for the layers after k, so it is not for generation."""
        return copy_state(self._cache)

    def resume(self) -> Any:
        """Run the remaining layers: the output is that of `model(...)`, bit for bit.

        Each call returns an output with a complete cache of its own. (In train mode, dropout draws
        new random numbers. This object holds the first layers' outputs in memory.)
        """
        return self.resume_both()[1]

    def resume_both(self) -> tuple[Any, Any]:
        """Run the remaining layers; returns the decoder's output and the model's."""
        memory = self._stored()
        inputs, walk = copy_state(memory.inputs), _ReplayWalk(memory)
        return run_both(memory.anatomy, inputs, handlers=walk.handlers())

    def resume_decoder(self) -> Any:
        """Run the remaining layers without the head; returns the decoder's output."""
        memory = self._stored()
        inputs, walk = copy_state(memory.inputs), _ReplayWalk(memory)
        return run_decoder(memory.anatomy, inputs, handlers=walk.handlers())

    def _stored(self) -> _Memory:
        if self._memory is None:
            raise InvalidInput(
                "this run cannot be resumed: resumable=False stores no outputs of its layers"
            )
        return self._memory


@dataclass(frozen=True, eq=False)
class _Memory:
    """What is needed to run the model again without its first layers."""

    anatomy: Anatomy
    inputs: dict[str, Any]
    outputs: list[Any]
    """Those of the first layers."""
    states: tuple[Any, ...]
    """The caches and side states that the last of them got, as they were after it."""


class Walk:
    """Follows one forward from layer to layer; each may run once, and in order."""

    def __init__(self, anatomy: Anatomy) -> None:
        self.anatomy = anatomy
        self.layers = list(anatomy.layers)
        self.at = -1

    def step_to(self, layer: nn.Module) -> int:
        """The index of `layer`, which is being called. A model may skip layers (Mllama does)."""
        ahead = range(self.at + 1, len(self.layers))
        index = next((index for index in ahead if self.layers[index] is layer), None)
        if index is None:
            earlier = next(i for i, candidate in enumerate(self.layers) if candidate is layer)
            raise _unsupported(
                self.anatomy,
                f"it runs layer {earlier} after layer {self.at}, not each once and in order",
            )
        self.at = index
        return index


class _FirstWalk(Walk):
    """Runs the first k layers, stores their outputs, and skips the other layers."""

    def __init__(self, anatomy: Anatomy, k: int, resumable: bool) -> None:
        super().__init__(anatomy)
        self.k = k
        self.resumable = resumable
        self.grad, self.hides_gradient = torch.is_grad_enabled(), False
        self.hidden: Tensor | None = None
        self.result: Any = None
        self.outputs: list[Any] = []
        self.live_states: list[Any] = []
        self.states: tuple[Any, ...] | None = None

    def handlers(self) -> dict[Target, Handler]:
        handlers: dict[Target, Handler] = {(self.anatomy.decoder, FORWARD): self._stop_after}
        if self.anatomy.norm is not None:
            handlers[self.anatomy.norm, FORWARD] = self._before_norm
        for layer in self.layers:
            handlers[layer, CALL] = self._call_of(layer)
            if self.resumable:
                handlers[layer, FORWARD] = self._record
        return handlers

    def _call_of(self, layer: nn.Module) -> Handler:
        def call(original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            if self.step_to(layer) < self.k:
                self.hides_gradient |= self.grad and not torch.is_grad_enabled()
                self.result = original(*args, **kwargs)
            else:
                self._copy_states()
            return self.result

        return call

    def _record(self, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        self.outputs.append(output)
        self.live_states = _states(args, kwargs)
        return output

    def _copy_states(self) -> None:
        """Copy the states after the first layers, before anything else changes them."""
        if self.states is None and self.outputs:
            self.outputs[-1], *states = copy_state((self.outputs[-1], *self.live_states))
            self.states = tuple(states)

    def _before_norm(self, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self.at + 1 == len(self.layers):
            self._copy_states()
        self.hidden = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
        return original(*args, **kwargs)

    def _stop_after(self, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        if self.result is None:
            raise _unsupported(self.anatomy, f"none of its first {self.k} layers were run")
        if self.hides_gradient:
            reason = "its layers hide their gradients from autograd (reversible layers)"
            raise _unsupported(self.anatomy, reason, "Under torch.no_grad() it works.")
        self._copy_states()
        raise Stopped(output)


class _ReplayWalk(Walk):
    """Replaces the first layers by their stored outputs, and runs the others."""

    def __init__(self, memory: _Memory) -> None:
        super().__init__(memory.anatomy)
        self.memory = memory
        self.outputs = list(memory.outputs)

    def handlers(self) -> dict[Target, Handler]:
        return {(layer, FORWARD): self._forward_of(layer) for layer in self.layers}

    def _forward_of(self, layer: nn.Module) -> Handler:
        def forward(original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            self.step_to(layer)
            if not self.outputs:
                return original(*args, **kwargs)
            output = self.outputs.pop(0)
            if self.outputs:
                return output
            for live, saved in zip(_states(args, kwargs), self.memory.states, strict=True):
                restore_state(live, saved)
            return copy_state(output)

        return forward


def _states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    return [value for value in (*args, *kwargs.values()) if is_state(value)]


def cache_name(output: Any) -> str | None:
    """The model's name for the cache in an output; None if there is none."""
    return next((name for name in CACHE_NAMES if getattr(output, name, None) is not None), None)


def passed_cache(inputs: dict[str, Any]) -> str | None:
    """The name under which a model's inputs hold a cache with positions; None if there is none."""
    return next((name for name in CACHE_NAMES if _is_filled(inputs.get(name))), None)


def _is_filled(cache: Any) -> bool:
    """Whether it holds anything. (transformers' own has lengths if any of its layers attends.)"""
    if cache is None or not hasattr(cache, "get_seq_length"):
        return cache is not None
    try:
        return cache.get_seq_length() != 0
    except ValueError:
        return bool(cache.has_previous_state())


def _check_depth(anatomy: Anatomy, k: int) -> None:
    depth = len(anatomy.layers)
    if not isinstance(k, int) or not 1 <= k <= depth:
        raise InvalidInput(
            f"k = {k!r} layers cannot be run: {_name(anatomy)} has {depth}, so give 1 to {depth}"
        )


def collected_inside(anatomy: Anatomy, inputs: dict[str, Any]) -> str | None:
    """The flag of an output that layers collect, so that `resume`, which does not run all of them
    again, cannot return it; None if none is requested."""
    configs = (getattr(anatomy.model, "config", None), anatomy.config)
    for flag in ("output_attentions", "output_router_logits"):
        if inputs.get(flag, any(getattr(config, flag, False) for config in configs)):
            return flag
    return None


def _check_inputs(anatomy: Anatomy, inputs: dict[str, Any]) -> None:
    if (flag := collected_inside(anatomy, inputs)) is not None:
        raise InvalidInput(
            f"{flag} is on, and a resumed run cannot collect it from the layers that are not "
            f"run again: pass {flag}=False, or resumable=False"
        )


def _unsupported(anatomy: Anatomy, reason: str, way_out: str = "") -> UnsupportedModel:
    message = f"{_name(anatomy)} cannot be stopped after k layers: {reason}. {way_out}"
    return UnsupportedModel(message.rstrip())


def _name(anatomy: Anatomy) -> str:
    return type(anatomy.model).__name__


# --- proof ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DepthProof:
    """None for each property that holds, and the reason for each that does not."""

    first_layers: str | None
    """`run_first` with all layers gives the decoder's own last hidden state."""
    resume: str | None
    """Stopped half-way and resumed, the model gives its own output and a cache to continue from."""


@torch.no_grad()
def prove_depth(model: nn.Module | Anatomy, input_ids: Tensor, **inputs: Any) -> DepthProof:
    """Compare a full run of `model` with one that is stopped and resumed, bit by bit."""
    inputs = {"input_ids": input_ids, **inputs}
    inputs.setdefault("use_cache", _can_cache(model, inputs))
    return DepthProof(
        first_layers=_reason(_compare_last_hidden_states, model, inputs),
        resume=_reason(_compare_outputs, model, inputs),
    )


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal in shape, dtype and every element, NaN being equal to itself."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def _compare_last_hidden_states(anatomy: Anatomy, inputs: dict[str, Any]) -> str | None:
    decoded, _ = run_both(anatomy, copy_state(inputs))
    first = run_first(anatomy, len(anatomy.layers), resumable=False, **inputs)
    if same_bits(first.normed, last_hidden_state(decoded)):
        return None
    return "all layers do not give the model's own last hidden state"


def _compare_outputs(anatomy: Anatomy, inputs: dict[str, Any]) -> str | None:
    full = anatomy.model(**copy_state(inputs))
    resumed = run_first(anatomy, max(1, len(anatomy.layers) // 2), **inputs).resume()
    if not same_bits(resumed.logits, full.logits):
        return "the resumed logits are not the model's own"
    name = cache_name(full)
    if name is None:
        return None
    try:
        expected = _next_logits(anatomy.model, full, name)
    except Exception:  # the model cannot continue from its own cache: nothing to compare with
        return None
    if same_bits(_next_logits(anatomy.model, resumed, name), expected):
        return None
    return "the resumed cache does not carry on as the model's own"


def _can_cache(model: nn.Module | Anatomy, inputs: dict[str, Any]) -> bool:
    """Whether the model runs with `use_cache`; BLT does not."""
    whole = model.model if isinstance(model, Anatomy) else model
    try:
        whole(**copy_state(inputs), use_cache=True)
    except Exception:
        return False
    return True


def _next_logits(model: nn.Module, output: Any, name: str) -> Tensor:
    token = output.logits[:, -1:].argmax(dim=-1)
    return model(input_ids=token, use_cache=True, **{name: getattr(output, name)}).logits


def _reason(
    compare: Callable[[Anatomy, dict[str, Any]], str | None],
    model: nn.Module | Anatomy,
    inputs: dict[str, Any],
) -> str | None:
    try:
        anatomy = model if isinstance(model, Anatomy) else Anatomy.of(model)
        return compare(anatomy, inputs)
    except Exception as error:  # any failure is a reason
        return f"{type(error).__name__}: {error}"
