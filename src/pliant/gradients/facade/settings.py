"""The seed's settings as a GradientConfig."""

from __future__ import annotations

from pliant.gradients.config import Engine, GradientConfig, Score, Selection


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
