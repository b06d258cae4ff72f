"""Train a scorer from the command line.

    python -m pliant.complexity --model_name nano-s --data labels.jsonl --num_epochs 4

Every field of CPXTrainingConfig and CPXDatasetConfig is a flag. `accelerate launch -m
pliant.complexity ...` runs it on several devices.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from pliant.cli import terminal
from pliant.complexity.training.config import CPXDatasetConfig, CPXModelConfig, CPXTrainingConfig
from pliant.complexity.training.flags import Flags
from pliant.errors import PliantError

PROGRAM = "python -m pliant.complexity"


def main(arguments: Sequence[str] | None = None) -> int:
    about = "Train a scorer: a JSONL or CSV file, or a hub data set, of prompts and labels."
    terminal.hush_libraries()
    flags = Flags(PROGRAM, about, CPXModelConfig, CPXTrainingConfig, CPXDatasetConfig)
    try:
        run(*flags.read(arguments))
    except PliantError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except OSError as error:  # a folder that cannot be written, a full disk
        what = error.filename or "the output"
        print(f"error: {what}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted; --resume goes on from what was saved", file=sys.stderr)
        return 130
    return 0


def run(model: CPXModelConfig, training: CPXTrainingConfig, data: CPXDatasetConfig) -> None:
    from pliant.complexity.training.run import train_scorer

    report = train_scorer(model, training, data)
    if int(os.environ.get("RANK", 0)) == 0:
        print(report or "every step was trained before")
        print(f"saved in {training.output_dir}")


if __name__ == "__main__":
    sys.exit(main())
