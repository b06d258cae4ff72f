"""Plasticity: prune heads, train, grow some of them again, train on; and sleep.

`model` is the cycle and what it attaches, `training` runs it under transformers' Trainer, `growth`
ranks the closed heads, and `report` shows what each phase did, beside a control. `sleep` merges
heads that write nearly the same.
"""

from pliant.structure.plasticity.config import PlasticityConfig, SleepConfig
from pliant.structure.plasticity.model import Plasticity, attach_plasticity
from pliant.structure.plasticity.report import (
    PhaseRow,
    PlasticityResult,
    Regrowth,
    compare_regrowth,
)
from pliant.structure.plasticity.sleep import SleepResult, sleep
from pliant.structure.plasticity.training import make_plastic

__all__ = [
    "PhaseRow",
    "Plasticity",
    "PlasticityConfig",
    "PlasticityResult",
    "Regrowth",
    "SleepConfig",
    "SleepResult",
    "attach_plasticity",
    "compare_regrowth",
    "make_plastic",
    "sleep",
]
