"""Warnings about training that is not what its user expects.

A selection may train another loss than that of all tokens (`BiasedWarning`). And a program that
replaces a model's `forward` after we did may run its decoder without ever calling ours (trl's
trainers do), or compute the loss itself without labels (label smoothing does): both train every
token at the full cost, silently.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from pliant.adapters.hooks import Patch
from pliant.gradients.config import GradientConfig

HARDEST = ("topk", "sequence_aware", "fixed_quota")
"""Rules that select hard tokens without weights to correct for it."""
BIASED = (*HARDEST, "stratified")

_INSTEAD = 'selection = "sampled" trains the loss of all, on average.'
_REASONS = {
    "stratified": "draws harder tokens more often and weights all alike, so it trains another "
    f"loss than that of all tokens: measured in docs/gradients-seed.md. {_INSTEAD}",
} | dict.fromkeys(
    HARDEST,
    "trains on the hardest tokens alone: measured from scratch, the loss of all tokens then stays "
    f"far behind that of training on random ones (docs/gradients-seed.md). {_INSTEAD}",
)


class BiasedWarning(UserWarning):
    """The selection trains another loss than that of all tokens."""


def warn_if_biased(config: GradientConfig) -> None:
    """Once, where the configuration is made, and not at each step."""
    if config.needs_scores and config.selection in BIASED and config.ratio < 1:
        message = f"selection = {config.selection!r} {_REASONS[config.selection]}"
        warnings.warn(message, BiasedWarning, stacklevel=_outside())


def _outside() -> int:
    """The stack level of the code that called this package."""
    level, frame = 0, sys._getframe()
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] == "pliant":
        level, frame = level + 1, frame.f_back
    return level


# --- going past the forward ----------------------------------------------------------------------


class _Inside(threading.local):
    """The adapters whose forward is running in this thread."""

    def __init__(self) -> None:
        self.of: tuple[Any, ...] = ()


_INSIDE = _Inside()


@contextmanager
def inside(adapter: Any) -> Iterator[None]:
    before = _INSIDE.of
    _INSIDE.of = (*before, adapter)
    try:
        yield
    finally:
        _INSIDE.of = before


def is_bypassed(adapter: Any, model: nn.Module) -> bool:
    """Whether the decoder is run by a forward that replaced ours."""
    if any(adapter is active for active in _INSIDE.of):
        return False
    return not isinstance(vars(model).get("forward"), Patch)


def is_nested(adapter: Any) -> bool:
    """Whether another adapter of the same model is active around this one."""
    return any(o is not adapter and o.base is adapter.base for o in _INSIDE.of)


def bypassed_message(model: nn.Module) -> str:
    return (
        f"{type(model).__name__} is trained without its forward, which selects tokens: all of them "
        "are trained, at the full cost. trl's trainers do this: use pliant.gradients.training's "
        "SelectiveMixin, as in class MySFT(SelectiveMixin, SFTTrainer)."
    )


def unlabelled_message(model: nn.Module) -> str:
    return (
        f"{type(model).__name__} is trained without labels, so its loss is "
        "computed elsewhere, from every token (label_smoothing_factor and compute_loss_func do "
        "this). Leave these out, and pass the labels to the model."
    )
