"""Backward through some positions alone: two passes, the first of them without gradient.

The first pass runs the whole sequences and keeps every layer's keys and values. The second runs the
chosen positions only, as queries against all of them, with their own live ones written over. What
comes out at the chosen positions is what the whole forward gives there; what it costs is 1 + 3r
forwards instead of 3.

Letters: B sequences of T positions, K of them chosen, H heads, E features a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

from pliant.anatomy import Anatomy
from pliant.anatomy.decoder import last_hidden_state
from pliant.anatomy.modes import attention_among, without_checkpointing
from pliant.errors import UnsupportedModel
from pliant.gradients.engines.layers import (
    CACHES,
    MASK,
    Arguments,
    Exit,
    PositionSelector,
    at_each_layer,
    causal,
)
from pliant.gradients.engines.split_forward import SplitForward, detached, tokens_of

KINDS = ("sdpa", "eager")
"""They accept a mask of any shape; where another attention is set, sdpa computes these passes."""


@dataclass(frozen=True, eq=False)
class First:
    """What the second pass needs of the first."""

    pairs: dict[int, Pair]
    decoded: Any
    scored_BTD: Tensor
    """The hidden states that scores are taken from."""


def first_pass(
    split: SplitForward,
    inputs: dict[str, Any],
    *,
    one_hop: bool = False,
    exit_layer: int | None = None,
) -> First:
    """Run whole sequences without gradient. With `one_hop`, keys and values keep the graph of the
    layer that made them, and no more."""
    anatomy = split.anatomy
    recording, exit = Recording(), Exit(anatomy, exit_layer)
    split.ledger.backbone(tokens_of(inputs), live=False)

    def call(i: int, original: Callable[..., Any], given: Arguments) -> Any:
        given.give(CACHES, recording)
        with torch.set_grad_enabled(one_hop):
            return exit.see(i, detached(given.call(original)))

    with (
        torch.no_grad(),
        attention_among(anatomy.model, *KINDS),
        without_checkpointing(anatomy.model),
    ):
        decoded = split.backbone(inputs, at_each_layer(anatomy, call))
        return First(recording.pairs, decoded, exit.hidden(last_hidden_state(decoded)))


def second_pass(
    split: SplitForward,
    inputs: dict[str, Any],
    pairs: dict[int, Pair],
    at_BK: Tensor,
    live_BK: Tensor,
) -> Any:
    """What the decoder returns, right at the chosen positions alone, with their gradient."""
    anatomy = split.anatomy
    length = next(iter(pairs.values()))[0].shape[-2]
    with attention_among(anatomy.model, *KINDS), without_checkpointing(anatomy.model) as again:
        select, writing = PositionSelector(at_BK, length), Writing(pairs, at_BK, live_BK, again)
        split.ledger.backbone(at_BK.numel(), live=True, again=again)
        eager = getattr(anatomy.config, "_attn_implementation", None) != "sdpa"
        plain: list[Tensor] = []

        def call(i: int, original: Callable[..., Any], given: Arguments) -> Any:
            if i == 0:
                given.hidden = select.rows(given.hidden)
            if given.get(MASK) is None:
                plain[:] = plain or [causal(length, at_BK, eager, given.hidden.dtype)]
                given.map(select)
                given.give((MASK,), plain[0])
            else:
                given.map(select)
            given.give(CACHES, writing)
            if again:
                rerun = _as_now(anatomy, original)
                answer = checkpoint(rerun, *given.args, use_reentrant=False, **given.kwargs)
            else:
                answer = given.call(original)
            # What ends the model may count on as many positions as went in.
            last = i + 1 == len(anatomy.layers)
            return scattered(answer, at_BK, live_BK, length) if last else answer

        return split.backbone(inputs, at_each_layer(anatomy, call, with_adapters=True))


def _as_now(anatomy: Anatomy, layer: Callable[..., Any]) -> Callable[..., Any]:
    """Runs a layer on the way back, when these blocks are left, as it runs inside them."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with attention_among(anatomy.model, *KINDS), without_checkpointing(anatomy.model):
            return layer(*args, **kwargs)

    return run


def scattered(answer: Any, at_BK: Tensor, live_BK: Tensor, length: int) -> Any:
    """The last layer's answer at the chosen positions of (B, T, D), and zeros at the others."""
    if isinstance(answer, tuple):
        return (scattered(answer[0], at_BK, live_BK, length), *answer[1:])
    # A spare slot repeats a position, and would get that position's gradient once more.
    answer = torch.where(live_BK.unsqueeze(-1), answer, answer.detach())
    everywhere = answer.new_zeros(answer.shape[0], length, answer.shape[-1])
    return everywhere.scatter(1, at_BK.unsqueeze(-1).expand_as(answer), answer)


# --- completions ----------------------------------------------------------------------------------


def completion(
    split: SplitForward, inputs: dict[str, Any], valid_BT: Tensor, *, always: bool = False
) -> Any | None:
    """What the decoder returns, right from each row's first to its last valid position.

    None where there is no prompt to spare: rows are labelled from their start on, or none is. With
    `always`, two passes are made even so, as other processes may make them (see `sharded`).
    """
    length = valid_BT.shape[1]
    first_B = torch.where(valid_BT.any(1), valid_BT.int().argmax(1), length)
    labelled_B = first_B < length
    prompt = int(first_B[labelled_B].max()) if bool(labelled_B.any()) else 0
    if prompt == 0 and not always:
        return None
    prompt = max(1, prompt)
    end = max(prompt, length - int(valid_BT.any(0).flip(0).int().argmax()))
    at_BK, live_BK = _from_first_on(valid_BT, first_B, end)
    first = first_pass(split, shortened(inputs, valid_BT.shape, prompt))
    inputs = shortened(inputs, valid_BT.shape, end)
    return second_pass(split, inputs, extended(first.pairs, end), at_BK, live_BK)


def _from_first_on(valid_BT: Tensor, first_B: Tensor, end: int) -> tuple[Tensor, Tensor]:
    """Each row's positions from its first valid one to its last; spare slots repeat the last."""
    length = valid_BT.shape[1]
    last_B = length - 1 - valid_BT.flip(1).int().argmax(1)
    none_B = first_B == length
    first_B, last_B = first_B.masked_fill(none_B, 0), last_B.masked_fill(none_B, 0)
    widest = int((last_B - first_B).max()) + 1
    at_BK = first_B[:, None] + torch.arange(widest, device=valid_BT.device)
    live_BK = (at_BK <= last_B[:, None]) & ~none_B[:, None]
    return at_BK.minimum(last_B[:, None]), live_BK


def shortened(inputs: dict[str, Any], shape: tuple[int, ...], length: int) -> dict[str, Any]:
    """The inputs of the first `length` positions."""
    return {name: _truncate(value, tuple(shape), length) for name, value in inputs.items()}


def _truncate(value: Any, shape: tuple[int, ...], length: int) -> Any:
    if not isinstance(value, Tensor) or value.dim() < 2:
        return value
    if value.dim() == 4 and value.shape[-2:] == (shape[1], shape[1]):
        return value[..., :length, :length]
    if value.shape[0] in (1, shape[0]) and value.shape[1] == shape[1]:
        return value[:, :length]
    if value.dim() == 3 and value.shape[1:] == shape:
        return value[:, :, :length]
    return value


# --- keys and values ------------------------------------------------------------------------------

# `Recording` stores those of one pass and `Writing` updates them in another; both take the place of
# a layer's cache.

Pair = tuple[Tensor, Tensor]


class _Pairs(DynamicCache):
    """Keys and values by layer."""

    def __init__(self, pairs: dict[int, Pair]) -> None:
        super().__init__()
        self.layers = _NoStates()
        self.pairs = pairs

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


class Recording(_Pairs):
    """Stores the keys and values that every layer attends to, and returns them unchanged."""

    def __init__(self) -> None:
        super().__init__({})

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> Pair:
        self.pairs[layer_idx] = key_states, value_states
        return key_states, value_states


class Writing(_Pairs):
    """All positions' keys and values: those of another pass, the live ones' written over them.

    The gradient goes into what is live; into the rest only if they came with a graph.
    """

    def __init__(self, pairs: dict[int, Pair], at_BK: Tensor, live_BK: Tensor, again: bool) -> None:
        super().__init__(pairs)
        self.at_B1K1 = at_BK[:, None, :, None]
        self.spare_B1K1 = None if bool(live_BK.all()) else ~live_BK[:, None, :, None]
        self.again = again
        """Whether a layer may run twice (checkpointing): then nothing is written in place."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> Pair:
        keys, values = self.pairs[layer_idx]
        return self._written(keys, key_states), self._written(values, value_states)

    def _written(self, all_BHTE: Tensor, live_BHKE: Tensor) -> Tensor:
        if self.spare_B1K1 is not None:
            # A spare slot repeats a position: its gradient would count that position twice.
            live_BHKE = torch.where(self.spare_B1K1, live_BHKE.detach(), live_BHKE)
        at = self.at_B1K1.expand_as(live_BHKE)
        if self.again or not _is_ours_alone(all_BHTE):
            return all_BHTE.scatter(-2, at, live_BHKE)
        return all_BHTE.data.scatter_(-2, at, live_BHKE)


class _NoStates(list[Any]):
    """A layer that asks for more than keys and values has a state that positions cannot share."""

    def __getitem__(self, index: Any) -> Any:
        raise UnsupportedModel("it has layers that keep a running state instead of keys and values")


def _is_ours_alone(tensor: Tensor) -> bool:
    """Whether it can be written in place: it has no graph and shares its memory with nothing."""
    own = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return own and not tensor.requires_grad


def extended(pairs: dict[int, Pair], length: int) -> dict[int, Pair]:
    """Padded with zeros for later positions, which the second pass writes."""
    return {layer: (_longer(k, length), _longer(v, length)) for layer, (k, v) in pairs.items()}


def _longer(some_BHPE: Tensor, length: int) -> Tensor:
    b, h, p, e = some_BHPE.shape
    longer = some_BHPE.new_empty(b, h, length, e)
    longer[:, :, :p] = some_BHPE
    longer[:, :, p:] = 0
    return longer
