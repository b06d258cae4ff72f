"""`pliant train scorer`: from a file of prompts and labels to a scorer in a folder."""

from __future__ import annotations

import os

from pliant.complexity.training.config import CPXDatasetConfig, CPXModelConfig, CPXTrainingConfig

EXAMPLE = "pliant train scorer --model-name nano-s --data labels.jsonl --output-dir my-scorer"


def scorer(model: CPXModelConfig, training: CPXTrainingConfig, data: CPXDatasetConfig) -> None:
    """Train a scorer: a JSONL or CSV file, or a hub data set, of prompts and labels.

    `accelerate launch -m pliant.complexity` runs the same command on several devices.
    """
    from pliant.complexity.training.run import train_scorer

    try:
        report = train_scorer(model, training, data)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("--resume continues from what was saved") from None
    if int(os.environ.get("RANK", 0)) == 0:
        print(report or "every step was trained before")
        print(f"saved in {training.output_dir}")
