"""Attach a scorer to a model: score prompts, score them while the model answers, export the scorer.

scorer = attach(model, CPXConfig(), tokenizer)
scorer.score(["What is 2 + 2?"]).score        # 1 - P(the model gets it right)
scorer.generate(["What is 2 + 2?"])           # scored from the prefill that it needs anyway
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from pliant import adapters
from pliant.complexity.config import CPXConfig
from pliant.complexity.export import ExportResult, export
from pliant.complexity.generation import Generated, Leaving, generate
from pliant.complexity.prompts import Truncation
from pliant.complexity.scorer import PromptScorer


def attach(
    model: nn.Module,
    config: CPXConfig | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    name: str | None = None,
) -> Complexity:
    """A new scorer on `model`; the tokenizer turns texts and messages into ids."""
    scorer = Complexity(model, config or CPXConfig())
    scorer.tokenizer = tokenizer
    return adapters.attach(model, scorer, name)


class Complexity(PromptScorer):
    """A scorer that also generates and leaves as a stock model."""

    def generate(
        self,
        prompts: Any,
        *,
        leave_above: Leaving | None = None,
        batch_size: int | None = None,
        chat: bool = False,
        truncation: Truncation | None = None,
        **options: Any,
    ) -> Generated:
        """Generate as `model.generate(**options)` does, and score from the same prefill.

        Prompts as for `score`, or a tensor of ids with `attention_mask` among the options. Those
        with a score above `leave_above` are left to another model and not generated. It may also be
        a function of the scores that selects the prompts to leave.
        """
        self._check_enabled()
        settings = {"batch_size": batch_size, "chat": chat, "truncation": truncation}
        return generate(self, prompts, leave_above, settings, options)

    def export(self, folder: str | Path, tokenizer: Any = None, **options: Any) -> ExportResult:
        """Leave as a stock `*ForSequenceClassification`: see `pliant.complexity.export`."""
        return export(self, folder, tokenizer, **options)
