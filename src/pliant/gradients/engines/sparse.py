"""Backward through some positions alone: two passes, the first of them without gradient.

The first pass runs the whole sequences and keeps every layer's keys and values. The second runs the
chosen positions only, as queries against all of them, with their own live ones written over. What
comes out at the chosen positions is what the whole forward gives there; what it costs is 1 + 3r
forwards instead of 3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pliant.anatomy import Anatomy
from pliant.anatomy.decoder import last_hidden_state
from pliant.anatomy.modes import attention_among, without_checkpointing
from pliant.gradients.engines.kv import Pair, Recording, Writing
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
        eager = getattr(anatomy.config, "_attn_implementation", None) not in ("sdpa",)
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
            return spread(answer, at_BK, live_BK, length) if last else answer

        return split.backbone(inputs, at_each_layer(anatomy, call))


def _as_now(anatomy: Anatomy, layer: Callable[..., Any]) -> Callable[..., Any]:
    """Runs a layer on the way back, when these blocks are left, as it runs inside them."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with attention_among(anatomy.model, *KINDS), without_checkpointing(anatomy.model):
            return layer(*args, **kwargs)

    return run


def spread(answer: Any, at_BK: Tensor, live_BK: Tensor, length: int) -> Any:
    """The last layer's answer at the chosen positions of (B, T, D), and zeros at the others."""
    if isinstance(answer, tuple):
        return (spread(answer[0], at_BK, live_BK, length), *answer[1:])
    # A spare slot repeats a position, and would get that position's gradient once more.
    answer = torch.where(live_BK.unsqueeze(-1), answer, answer.detach())
    everywhere = answer.new_zeros(answer.shape[0], length, answer.shape[-1])
    return everywhere.scatter(1, at_BK.unsqueeze(-1).expand_as(answer), answer)
