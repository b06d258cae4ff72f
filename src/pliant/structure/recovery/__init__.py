"""Recovery: train a smaller model until it predicts almost as the whole one did.

`training` is the run on an exported model, and `gated` one before the export, beside the whole
model; `run` is what both do, and `config` what a user may set. `trainer` computes their loss,
`trained_weights` says what of the model is trained, and `distillation` is the loss against a
teacher.
"""

from pliant.structure.recovery.config import DISTILL, RecoveryConfig
from pliant.structure.recovery.gated import recover_gated
from pliant.structure.recovery.run import RecoveryResult, split
from pliant.structure.recovery.training import (
    Engine,
    check_engine,
    check_teacher,
    check_vocabularies,
    recover,
)

__all__ = [
    "DISTILL",
    "Engine",
    "RecoveryConfig",
    "RecoveryResult",
    "check_engine",
    "check_teacher",
    "check_vocabularies",
    "recover",
    "recover_gated",
    "split",
]
