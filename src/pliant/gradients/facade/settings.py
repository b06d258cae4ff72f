"""The seed's settings as a GradientConfig, and a word to those who train the hardest alone."""

from __future__ import annotations

import warnings

from pliant.errors import InvalidInput
from pliant.gradients.config import Engine, GradientConfig, Score, Selection

HARDEST = ("topk", "sequence_aware", "fixed_quota")
"""The rules that take tokens for being hard, and say nothing of it in the weights."""


class HardestTokensWarning(UserWarning):
    """A rule is used that was measured to do worse than as many tokens at random."""


def config_of(
    *,
    min_tokens_ratio: float,
    warmup_steps: int,
    dynamic_threshold: bool,
    threshold_sensitivity: float,
    selection: Selection,
    scoring: Score,
    num_strata: int = 4,
    min_tokens_per_sequence: int = 1,
    engine: Engine = "exact",
) -> GradientConfig:
    """The seed's names for what a GradientConfig holds."""
    if scoring == "excess":
        raise InvalidInput(
            'scoring = "excess" compares with a reference: pliant.gradients.attach takes one'
        )
    return GradientConfig(
        engine=engine,
        ratio=min_tokens_ratio,
        selection=selection,
        score=scoring,
        warmup_steps=warmup_steps,
        dynamic=dynamic_threshold,
        sensitivity=threshold_sensitivity,
        num_strata=num_strata,
        min_tokens_per_sequence=min_tokens_per_sequence,
    )


def warn_of_the_hardest(config: GradientConfig, stacklevel: int = 3) -> None:
    """Said where such a rule is asked for, not at each step."""
    if config.selection in HARDEST and config.ratio < 1:
        warnings.warn(
            f"selection = {config.selection!r} trains on the hardest tokens alone: measured from "
            "scratch, the loss of all tokens then stays far behind that of training on random ones "
            '(docs/gradients-seed.md). selection = "sampled" trains the loss of all, on average.',
            HardestTokensWarning,
            stacklevel=stacklevel,
        )
