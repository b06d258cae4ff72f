"""A word to those who choose by a rule that trains another loss than that of all tokens."""

from __future__ import annotations

import sys
import warnings

from pliant.gradients.config import GradientConfig

HARDEST = ("topk", "sequence_aware", "fixed_quota")
"""The rules that take tokens for being hard, and say nothing of it in the weights."""
BIASED = (*HARDEST, "stratified")

_INSTEAD = 'selection = "sampled" trains the loss of all, on average.'
_SAID = {
    "stratified": "draws the harder tokens more often and weighs all alike, so it trains another "
    f"loss than that of all tokens: measured in docs/gradients-seed.md. {_INSTEAD}",
} | dict.fromkeys(
    HARDEST,
    "trains on the hardest tokens alone: measured from scratch, the loss of all tokens then stays "
    f"far behind that of training on random ones (docs/gradients-seed.md). {_INSTEAD}",
)


class BiasedWarning(UserWarning):
    """A rule is used that trains another loss than that of all tokens."""


def warn_of(config: GradientConfig) -> None:
    """Said where such a rule is asked for, not at each step."""
    if config.needs_scores and config.selection in BIASED and config.ratio < 1:
        said = f"selection = {config.selection!r} {_SAID[config.selection]}"
        warnings.warn(said, BiasedWarning, stacklevel=_outside())


def _outside() -> int:
    """How far up the code is that called this package."""
    level, frame = 0, sys._getframe()
    while frame.f_back is not None and _is_ours(frame.f_globals.get("__name__", "")):
        level, frame = level + 1, frame.f_back
    return level


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] == "pliant"
