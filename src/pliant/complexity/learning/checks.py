"""What is refused before a training begins: settings that do not go together, or do nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pliant.complexity.learning.config import CPXTrainingConfig
from pliant.errors import InvalidInput

if TYPE_CHECKING:
    from pliant.complexity.model import Complexity


def check_together(scorer: Complexity, config: CPXTrainingConfig) -> None:
    outputs = scorer.config.outputs
    if config.num_labels not in (None, len(outputs)):
        raise InvalidInput(
            f"num_labels = {config.num_labels}, and the scorer has {len(outputs)} outputs "
            f"({', '.join(outputs)}): give the same, or leave it out"
        )
    weights = config.class_weights
    if weights and (config.loss == "regression" or len(weights) != len(outputs)):
        raise InvalidInput(
            f"class_weights = {weights}: give one for each of {len(outputs)} outputs, and none for "
            "a regression"
        )
    token = getattr(scorer.tokenizer, "cpx_token", config.cpx_token)
    if token != config.cpx_token:
        raise InvalidInput(f"cpx_token = {config.cpx_token!r}, and the tokenizer's is {token!r}")
