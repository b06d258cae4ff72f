"""Train a scorer from the command line.

    python -m pliant.complexity --model_name nano-s --data labels.jsonl --num_epochs 4

Every field of CPXTrainingConfig and CPXDatasetConfig is a flag. `accelerate launch -m
pliant.complexity ...` runs it on several devices.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from pliant.complexity.training.config import CPXDatasetConfig, CPXTrainingConfig
from pliant.complexity.training.flags import Flags
from pliant.errors import InvalidInput, PliantError

PROGRAM = "python -m pliant.complexity"


@dataclass(frozen=True)
class CPXModelConfig:
    """The base, and the scorer on it."""

    model_name: str = "nano-s"
    """An embedded model, a folder, or a name on the hub."""
    dtype: str = "auto"
    device: str | None = None
    rows: int = 1
    """How many [CPX] positions follow a prompt."""
    outputs: tuple[str, ...] = ()
    """What each output means: score, gain, right:NAME, or names of your own."""
    aggregation: str = "last"
    """How several rows become one: last, mean, max, attention."""
    layer: int | None = None
    """Read after so many layers."""
    bias: bool = True
    lora_rank: int = 0
    """Of a LoRA that acts on [CPX] positions alone."""


def main(arguments: Sequence[str] | None = None) -> int:
    about = "Train a scorer: a JSONL or CSV file, or a hub data set, of prompts and labels."
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
    rows, held_rows = rows_of(data)
    from pliant import loading
    from pliant.complexity.config import CPXConfig
    from pliant.complexity.facade.tokenizer import CPXTokenizer
    from pliant.complexity.model import attach
    from pliant.complexity.training.dataset import dataset_of, encode
    from pliant.complexity.training.trainer import CPXTrainer
    from pliant.training.checkpoint import last_complete

    base, tokenizer = loading.load(model.model_name, dtype=model.dtype, device=model.device)
    config = CPXConfig(
        rows=model.rows,
        outputs=model.outputs,
        num_labels=training.num_labels,
        aggregation=model.aggregation,  # type: ignore[arg-type]
        layer=model.layer,
        bias=model.bias,
        lora_rank=model.lora_rank,
    )
    scorer = attach(base, config, CPXTokenizer.of(tokenizer, training.cpx_token))
    cut: Any = {"room": data.max_length, "truncation": "left" if data.truncate else None}
    into_ids = partial(encode, scorer, scorer.tokenizer, **cut)
    # All rows, in the order of their file: so what is wrong with one is said of its own number.
    said: Any = {"loss": training.loss, "outputs": scorer.config.outputs}
    train = dataset_of(rows, into_ids, **said)
    held = dataset_of(held_rows, into_ids, **said) if held_rows else train
    learned, evaluated = parts_of(data, len(rows), len(held_rows), training.seed)
    options: dict[str, Any] = {"use_cpu": True} if model.device == "cpu" else {}
    trainer = CPXTrainer(
        scorer,
        training.training_arguments(evaluates=True, **options),
        config=training,
        train_dataset=train.select(learned),
        eval_dataset=held.select(evaluated),
    )
    if trainer.duplicates and trainer.is_world_process_zero():
        print(trainer.duplicates, file=sys.stderr)
    trainer.train(
        resume_from_checkpoint=last_complete(training.output_dir) if training.resume else None
    )
    trainer.save_model(training.output_dir)
    if trainer.is_world_process_zero():
        print(trainer.report)
        print(f"saved in {training.output_dir}")


def rows_of(data: CPXDatasetConfig) -> tuple[list[Any], list[Any]]:
    """The rows of both sources, under the names that the trainer knows; the second may be none."""
    if not data.data:
        raise InvalidInput("no data: give --data FILE, or the name of a data set on the hub")
    from pliant.data import read_rows

    columns = {"prompt": data.prompt_column, "label": data.label_column}
    sources = (data.data, data.evaluation_data)
    rows, held = ([_named(row) for row in read_rows(s, columns)] if s else [] for s in sources)
    size = _held_back(data, len(rows))
    if not held and size >= len(rows):
        raise InvalidInput(
            f"evaluation_size = {size}, and {data.data} has {len(rows)} rows: none are left "
            "to train on"
        )
    return rows, held


def parts_of(
    data: CPXDatasetConfig, rows: int, held: int, seed: int
) -> tuple[Sequence[int], Sequence[int]]:
    """Which rows to train on, and which to evaluate on: of these, or of the second source's."""
    if held:
        return range(rows)[: data.data_size], range(held)[: data.evaluation_size]
    order, size = list(range(rows)), _held_back(data, rows)
    random.Random(seed).shuffle(order)
    return order[size:][: data.data_size], order[:size]


def _held_back(data: CPXDatasetConfig, rows: int) -> int:
    return data.evaluation_size or max(1, rows // 10)


def _named(row: dict[str, Any]) -> dict[str, Any]:
    """Messages and ids in the prompt's column are taken for what they are."""
    prompt = row["prompt"]
    return {
        "prompt": prompt.tolist() if hasattr(prompt, "tolist") else prompt,
        "label": row["label"],
    }


if __name__ == "__main__":
    sys.exit(main())
