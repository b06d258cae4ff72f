"""Recovery: train a smaller model until it predicts almost as the whole one did.

`training` is the run, `trained_weights` what of the model is trained, and `distillation` the loss
against a teacher.
"""

from pliant.structure.recovery.training import (
    DISTILL,
    RecoveryConfig,
    RecoveryResult,
    check_teacher,
    check_vocabularies,
    recover,
    split,
)

__all__ = [
    "DISTILL",
    "RecoveryConfig",
    "RecoveryResult",
    "check_teacher",
    "check_vocabularies",
    "recover",
    "split",
]
