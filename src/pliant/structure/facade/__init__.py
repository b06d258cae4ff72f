"""The interface of code that was written before: the seed's names, with its parameters."""

from pliant.structure.facade.adaptive_model import (
    AdaptiveModel,
    load_adaptive_model,
    load_baseline_model,
)

__all__ = ["AdaptiveModel", "load_adaptive_model", "load_baseline_model"]
