"""Run only a model's first k layers, and later, if it is wanted after all, the rest.

    first = run_first(model, 8, input_ids=ids)   # layers 8, 9, ... and the head are not computed
    score = probe(first.normed[:, -1])
    output = first.resume()                      # layers 0-7 are not computed again

It is the model's own forward that runs, with its own masks, positions, caches and side states.
After layer k the layers hand the hidden state through untouched, the model ends as it always does
(final norm, projection, collapse of its streams), and is stopped before the head. To resume, the
same forward runs again, with the first k layers answering from memory.

Left out: k = 0 (that is `anatomy.embeddings`), and layers that are not run once each and in order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pliant.anatomy.anatomy import Anatomy
from pliant.anatomy.cache_copy import copy_state, is_state, restore_state
from pliant.anatomy.decoder import Stopped, last_hidden_state, no_decoder_call
from pliant.anatomy.intercept import CALL, FORWARD, Handler, Target, intercept
from pliant.errors import InvalidInput, UnsupportedModel

CACHE_NAMES = ("past_key_values", "cache_params", "state", "mems", "past_buckets_states")
"""What models call their caches: attention, recurrent models, RWKV, XLNet, Reformer."""


def run_first(
    model: nn.Module | Anatomy, k: int, *, resumable: bool = True, **inputs: Any
) -> FirstLayers:
    """Run layers 0 to k - 1 on `inputs`, which are whatever `model(...)` takes, by name.

    A cache given among them is read and never written: the new entries are in the result.
    With `resumable=False` only the hidden states and the cache are kept: to train, say.
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
    memory = _Memory(anatomy, inputs, walk.answers, walk.left or ()) if resumable else None
    return FirstLayers(k, hidden, normed, name, cache, memory)


@dataclass(frozen=True, eq=False)
class FirstLayers:
    """What the first `k` layers made of a prompt."""

    k: int
    hidden: Tensor
    """What the model's final norm was given (the same as `normed` in a model that has none)."""
    normed: Tensor
    """The decoder's last hidden state, as if the model ended after layer k."""
    cache_name: str | None
    """What the model calls its cache, among its inputs as well; None without one."""
    _cache: Any = field(repr=False)
    _memory: _Memory | None = field(repr=False)

    @property
    def cache(self) -> Any:
        """The first k layers' cache, for one more `run_first` on top; None without `use_cache`.

        Each access branches it off anew. The layers above k have seen nothing: not for generation.
        """
        return copy_state(self._cache)

    def resume(self) -> Any:
        """The output `model(...)` would have given, bit for bit, from the remaining layers alone.

        May be called again: every output has a complete cache of its own. (In train mode dropout
        draws anew. The memory of the first layers is held for as long as this object is.)
        """
        if self._memory is None:
            raise InvalidInput(
                "this run cannot be resumed: it was made with resumable=False, which keeps nothing"
            )
        return self._memory.replay()


@dataclass(frozen=True, eq=False)
class _Memory:
    """All that is needed to run the model again without its first layers."""

    anatomy: Anatomy
    inputs: dict[str, Any]
    answers: list[Any]
    """What each of the first layers returned."""
    left: tuple[Any, ...]
    """The caches and side states that were passed to the last of them, as it left them."""

    def replay(self) -> Any:
        walk = _ReplayWalk(self)
        with intercept(walk.handlers()):
            return self.anatomy.model(**copy_state(self.inputs))


class _Walk:
    """Follows one forward from layer to layer; none may come again or out of order."""

    def __init__(self, anatomy: Anatomy) -> None:
        self.anatomy = anatomy
        self.layers = list(anatomy.layers)
        self.at = -1

    def step_to(self, layer: nn.Module) -> int:
        """The index of `layer`, which is being called. A layer may be left out (Mllama's are)."""
        ahead = range(self.at + 1, len(self.layers))
        following = next((index for index in ahead if self.layers[index] is layer), None)
        if following is None:
            seen = next(index for index, other in enumerate(self.layers) if other is layer)
            raise _unsupported(
                self.anatomy,
                f"it runs layer {seen} after layer {self.at}, not each once and in order",
            )
        self.at = following
        return following


class _FirstWalk(_Walk):
    """Runs the first k layers, remembers what they did, and passes it through the others."""

    def __init__(self, anatomy: Anatomy, k: int, resumable: bool) -> None:
        super().__init__(anatomy)
        self.k = k
        self.resumable = resumable
        self.grad, self.blind = torch.is_grad_enabled(), False
        self.hidden: Tensor | None = None
        self.result: Any = None
        self.answers: list[Any] = []
        self.passed: list[Any] = []
        self.left: tuple[Any, ...] | None = None

    def handlers(self) -> dict[Target, Handler]:
        handlers: dict[Target, Handler] = {(self.anatomy.decoder, FORWARD): self._stop_after}
        if self.anatomy.norm is not None:
            handlers[self.anatomy.norm, FORWARD] = self._before_norm
        for layer in self.layers:
            handlers[layer, CALL] = self._call_of(layer)
            if self.resumable:
                handlers[layer, FORWARD] = self._remember
        return handlers

    def _call_of(self, layer: nn.Module) -> Handler:
        def call(original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            if self.step_to(layer) < self.k:
                self.blind |= self.grad and not torch.is_grad_enabled()
                self.result = original(*args, **kwargs)
            else:
                self._settle()
            return self.result

        return call

    def _remember(self, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        answer = original(*args, **kwargs)
        self.answers.append(answer)
        self.passed = _states(args, kwargs)
        return answer

    def _settle(self) -> None:
        """The first layers are done: keep what they left, before anything else touches it."""
        if self.left is None and self.answers:
            self.answers[-1], *left = copy_state((self.answers[-1], *self.passed))
            self.left = tuple(left)

    def _before_norm(self, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self.at + 1 == len(self.layers):
            self._settle()
        self.hidden = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
        return original(*args, **kwargs)

    def _stop_after(self, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        if self.result is None:
            raise _unsupported(self.anatomy, f"none of its first {self.k} layers were run")
        if self.blind:
            reason = "its layers hide their gradients from autograd (reversible layers)"
            raise _unsupported(self.anatomy, reason, "Under torch.no_grad() it works.")
        self._settle()
        raise Stopped(output)


class _ReplayWalk(_Walk):
    """Lets the first layers answer from memory, and runs the others."""

    def __init__(self, memory: _Memory) -> None:
        super().__init__(memory.anatomy)
        self.memory = memory
        self.answers = list(memory.answers)

    def handlers(self) -> dict[Target, Handler]:
        return {(layer, FORWARD): self._forward_of(layer) for layer in self.layers}

    def _forward_of(self, layer: nn.Module) -> Handler:
        def forward(original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            self.step_to(layer)
            if not self.answers:
                return original(*args, **kwargs)
            answer = self.answers.pop(0)
            if self.answers:
                return answer
            for live, left in zip(_states(args, kwargs), self.memory.left, strict=True):
                restore_state(live, left)
            return copy_state(answer)

        return forward


def _states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    return [value for value in (*args, *kwargs.values()) if is_state(value)]


def cache_name(output: Any) -> str | None:
    """The name of the cache in an output and among the inputs; None if there is none."""
    return next((name for name in CACHE_NAMES if getattr(output, name, None) is not None), None)


def _check_depth(anatomy: Anatomy, k: int) -> None:
    depth = len(anatomy.layers)
    if not isinstance(k, int) or not 1 <= k <= depth:
        raise InvalidInput(
            f"k = {k!r} layers cannot be run: {_name(anatomy)} has {depth}, so give 1 to {depth}"
        )


def _check_inputs(anatomy: Anatomy, inputs: dict[str, Any]) -> None:
    """Refuse what is collected inside layers: those that are not run again would be missing."""
    configs = (getattr(anatomy.model, "config", None), anatomy.config)
    for flag in ("output_attentions", "output_router_logits"):
        if inputs.get(flag, any(getattr(config, flag, False) for config in configs)):
            raise InvalidInput(
                f"{flag} is on, and a resumed run cannot collect it from the layers that are not "
                f"run again: pass {flag}=False, or resumable=False"
            )


def _unsupported(anatomy: Anatomy, reason: str, way_out: str = "") -> UnsupportedModel:
    message = f"{_name(anatomy)} cannot be stopped after k layers: {reason}. {way_out}"
    return UnsupportedModel(message.rstrip())


def _name(anatomy: Anatomy) -> str:
    return type(anatomy.model).__name__
