"""What a user may set of a recovery."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from transformers import TrainingArguments

from pliant.errors import InvalidInput, check_choice, check_whole, named_settings
from pliant.structure.recovery.trained_weights import Train
from pliant.training.arguments import training_arguments

LEARNING_RATE = {"lora": 1e-3, "norms": 5e-3, "all": 1e-4}
SCHEDULE = {"lr_scheduler_type": "cosine", "warmup_steps": "0.05"}
DISTILL = 0.5
"""Of the loss, if there is a teacher and no other share is asked for."""


@named_settings
@dataclass(frozen=True)
class RecoveryConfig:
    """What is trained, and by what it is taught."""

    train: Train = "all"
    """All weights ("all"), low-rank matrices ("lora"), or vectors of norms and biases ("norms")."""
    rank: int = 16
    """Of the low-rank matrices."""
    distill: float = 0.0
    """The share of the loss that is the distance from the teacher's predictions, from 0 to 1; the
    rest is that of the text itself."""
    temperature: float = 1.0
    """Softens the predictions of the teacher and the student before they are compared."""

    def __post_init__(self) -> None:
        check_choice("train", self.train, get_args(Train))
        check_whole("rank", self.rank, 1)
        if not _is_number(self.distill) or not 0 <= self.distill <= 1:
            raise InvalidInput(f"distill = {self.distill!r}: give a share from 0 to 1")
        if not _is_number(self.temperature) or not 0 < self.temperature < math.inf:
            raise InvalidInput(f"temperature = {self.temperature!r}: give a number above 0")

    def arguments(self, folder: Path, settings: Mapping[str, str]) -> TrainingArguments:
        """The Trainer's, with a learning rate for what is trained unless the settings have one."""
        return training_arguments(folder, self.settings(settings))

    def settings(self, settings: Mapping[str, str]) -> dict[str, str]:
        rate = {"learning_rate": str(LEARNING_RATE[self.train])}
        return {**SCHEDULE, **rate, **settings}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
