"""`pliant train`: a language model or a scorer, trained in a folder that survives a kill."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import Ge

from pliant.cli import terminal
from pliant.cli.gradients.inputs import SelectiveOptions, quiet_libraries
from pliant.cli.shared_options import EngineOrAuto, TrainerOptions, load_to_train
from pliant.cli.training_text import check_template, encode, read_data
from pliant.complexity.training.config import CPXDatasetConfig, CPXModelConfig, CPXTrainingConfig

HELP = """Train a language model, on every token or on selected ones, or a scorer.

Without a command: `lm`. A run that is killed is resumed by the same command with --resume.

Example: pliant train --model nano-s --data notes.txt --out mine
"""
# Every command of the group and its line in `pliant train --help`.
COMMANDS = {
    "lm": "Train a language model; a short race decides on which tokens.",
    "scorer": "Train a scorer on prompts and labels: how hard is a prompt?",
}
DEFAULT = "lm"
QUESTIONS = 1000


@dataclass(frozen=True, kw_only=True)
class LmOptions(SelectiveOptions, TrainerOptions):
    out: Path
    """The run's folder, and in the end the model's."""
    engine: EngineOrAuto = "auto"
    """auto: a short race decides. Else how the selected tokens are trained."""
    length: Annotated[int, Ge(2)] = 512
    evaluate: str | None = None
    """Data like --data: its loss is measured at the end. Default: none."""
    lora: Annotated[int, Ge(1)] | None = None
    """Train low-rank matrices of this rank only. Default: all weights."""
    resume: bool = False
    """Resume from the run's last complete checkpoint."""
    json: bool = False
    """Print one JSON document."""


def lm(options: LmOptions) -> None:
    """Train a language model, on every token or on those that are worth a gradient.

    Killed at any moment, the run loses only the steps since its last checkpoint: the same command
    with --resume continues there and reaches the same losses.

    Example: pliant train lm --model nano-s --data notes.txt --out mine
    """
    from pliant.gradients import selective_run
    from pliant.gradients.cautions import BiasedWarning
    from pliant.reports.tables import Table
    from pliant.training.arguments import training_arguments
    from pliant.training.terminal import print_to_stderr

    config = options.config()
    settings = options.settings()
    args = training_arguments(options.out, settings)  # report mistakes before anything is loaded
    options.check_device(args)
    rows, held_out = read_data(options.data, "train", QUESTIONS, options), None
    if options.evaluate is not None:
        held_out = read_data(options.evaluate, "dev", QUESTIONS, options, evaluates=True)
    check_template(rows, options.model)
    model, tokenizer = load_to_train(options.model, options.dtype, options.device)
    train_texts = encode(rows, model, tokenizer, options.length)
    evaluation = held_out and encode(held_out, model, tokenizer, options.length)
    if train_texts.left_out:
        print_to_stderr(
            f"{train_texts.left_out} rows are left out: their completion begins beyond "
            f"{options.length} tokens"
        )
    plan = selective_run.Plan(
        model=options.model,
        data=options.data,
        content=train_texts.digest,
        config=asdict(config),
        settings=settings,
        lora=options.lora,
        dtype=options.dtype,
        auto=options.engine == selective_run.AUTO,
    )
    with quiet_libraries(BiasedWarning):
        result = selective_run.train_lm(
            model,
            tokenizer,
            train_texts,
            options.out,
            plan,
            evaluation=evaluation or None,
            resume=options.resume,
        )
    if options.json:
        terminal.print_json({"out": str(options.out), **result.as_dict()})
    else:
        head = ["what", "how much"]
        title = f"{options.out}: the trained model"
        Table(title, head, result.cells()).draw(terminal.console())


def scorer(model: CPXModelConfig, training: CPXTrainingConfig, data: CPXDatasetConfig) -> None:
    """Train a scorer: a JSONL or CSV file, or a hub data set, of prompts and labels.

    `accelerate launch -m pliant.complexity` runs the same command on several devices.

    Example: pliant train scorer --model-name nano-s --data labels.jsonl --output-dir my-scorer
    """
    from pliant.complexity.training.run import train_scorer

    try:
        report = train_scorer(model, training, data)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("--resume continues from what was saved") from None
    if int(os.environ.get("RANK", 0)) == 0:
        print(report or "every step was trained before")
        print(f"saved in {training.output_dir}")
