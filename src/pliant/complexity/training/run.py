"""The two ways to train a scorer: `fit`, from prompts and labels in memory and without files, and
`train_scorer`, from a file to a folder (`pliant train scorer`)."""

from __future__ import annotations

import hashlib
import json
import os
import random
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PrinterCallback

from pliant import loading
from pliant.complexity.config import CPXConfig
from pliant.complexity.model import Complexity, attach
from pliant.complexity.prefix_cache.policy import check_fits
from pliant.complexity.prefix_cache.store import PrefixStore, in_memory
from pliant.complexity.tokenizer import CPXTokenizer
from pliant.complexity.training.config import CPXDatasetConfig, CPXModelConfig, CPXTrainingConfig
from pliant.complexity.training.dataset import (
    PromptDataset,
    dataset_of,
    encode,
    ids_of,
    labels_of,
    plain,
    texts_of,
)
from pliant.complexity.training.report import TrainingReport
from pliant.complexity.training.train_module import train_module_of
from pliant.complexity.training.trainer import CPXTrainer
from pliant.data import read_prompts
from pliant.errors import InvalidInput
from pliant.training.arguments import check_reporters
from pliant.training.folder import read_record
from pliant.training.run import TrainingRun
from pliant.training.terminal import print_to_stderr

OUTSIDE_THE_PLAN = (
    "output_dir",
    "resume",
    "prefixes",
    "prefix_folder",
    "save_epochs",
    "logging_steps",
    "report_to",
)
"""Settings that change no loss beyond rounding: a resumed run may change them."""
MUCH_SLOWER = 1.2
"""From which slowdown a base in half precision is computed in float32. Of CPUs with bf16
instructions .2 to .5 was measured, of those without them 2 to 8."""


def fit(
    scorer: Complexity | nn.Module,
    prompts: Sequence[Any],
    labels: Any,
    *,
    evaluation: tuple[Sequence[Any], Any] | None = None,
    config: CPXTrainingConfig | None = None,
    prefixes: PrefixStore | None = None,
    **changes: Any,
) -> TrainingReport:
    """Train a scorer in place and leave no files; `changes` are fields of CPXTrainingConfig.

    `prompts` are texts, messages or ids. `prefixes` are the result of `remember(scorer, prompts)`,
    computed once for several scorers that read the same layer of one base.
    """
    config = replace(config or CPXTrainingConfig(), **changes)
    module = train_module_of(scorer, config.base_dropout)
    dataset = _dataset(module.scorer, prompts, labels, config)
    if prefixes is not None:
        check_fits(prefixes, module.scorer.prefilled, dataset.ids)
        dataset.stored = prefixes.with_capacity(module.scorer.config.rows)
    held_out = None if evaluation is None else _dataset(module.scorer, *evaluation, config)
    with tempfile.TemporaryDirectory() as folder:
        config = replace(config, output_dir=folder)
        args = config.training_arguments(
            evaluates=held_out is not None,
            disable_tqdm=True,
            logging_strategy="epoch",
            use_cpu=module.scorer.rows.device.type == "cpu",
        )
        trainer = CPXTrainer(
            module, args, config=config, train_dataset=dataset, eval_dataset=held_out
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    assert trainer.report is not None
    return trainer.report


def remember(scorer: Complexity | nn.Module, prompts: Sequence[Any]) -> PrefixStore:
    """The prompts' keys and values, in memory, for `fit(..., prefixes=...)`."""
    module = train_module_of(scorer)
    ids = ids_of(encode(module.scorer, module.scorer.tokenizer, prompts))
    return in_memory(module.scorer.prefilled, ids)


def _dataset(
    scorer: Complexity, prompts: Sequence[Any], labels: Any, config: CPXTrainingConfig
) -> PromptDataset:
    ids = ids_of(encode(scorer, scorer.tokenizer, prompts))
    values = plain(labels)
    if len(values) != len(ids):
        raise InvalidInput(
            f"{len(ids)} prompts and {len(values)} labels: give one label for each prompt"
        )
    targets = labels_of(values, loss=config.loss, outputs=scorer.config.outputs)
    return PromptDataset(ids, targets, texts_of(prompts))


# --- from a file to a folder ---------------------------------------------------------------------


def train_scorer(
    model: CPXModelConfig, training: CPXTrainingConfig, data: CPXDatasetConfig
) -> TrainingReport | None:
    """Train a scorer, or resume that, and save it in `output_dir`. Returns the report of this
    session; None, if nothing was left to train."""
    check_reporters([training.report_to])
    rows, held_out_rows = rows_of(data)
    with loading.not_computed_here() if model.dtype == "auto" else nullcontext():
        base, tokenizer = loading.load(model.model_name, dtype=model.dtype, device=model.device)
    if model.dtype == "auto":
        base = _in_fastest_dtype(base, Path(training.output_dir) if training.resume else None)
    of_both = {k: v for k, v in vars(model).items() if k in CPXConfig.__dataclass_fields__}
    config = CPXConfig(num_labels=training.num_labels, **of_both)
    scorer = attach(base, config, CPXTokenizer.of(tokenizer, training.cpx_token))
    limits: Any = {"max_length": data.max_length, "truncation": "left" if data.truncate else None}
    into_ids = partial(encode, scorer, scorer.tokenizer, **limits)
    # All rows, in the order of their file, so that an error names the row of the file.
    labels: Any = {"loss": training.loss, "outputs": scorer.config.outputs}
    train = dataset_of(rows, into_ids, **labels)
    held_out = dataset_of(held_out_rows, into_ids, **labels) if held_out_rows else train
    learned, evaluated = split(data, len(rows), len(held_out_rows), training.seed)
    train, held_out = train.select(learned), held_out.select(evaluated)
    options: dict[str, Any] = {"use_cpu": True} if model.device == "cpu" else {}
    args = training.training_arguments(evaluates=True, **options)
    plan = {
        "model": model.model_name,
        "data": data.data,
        "content": _digest(train, held_out),
        "scorer": asdict(config),
        "config": {k: v for k, v in asdict(training).items() if k not in OUTSIDE_THE_PLAN},
        "dtype": model.dtype,
    }
    run = TrainingRun(args, plan, resume=training.resume, shared=True)
    run.note(base_dtype=_name_of(base.dtype))

    def build() -> CPXTrainer:
        trainer = CPXTrainer(
            scorer, args, config=training, train_dataset=train, eval_dataset=held_out
        )
        if trainer.duplicates and trainer.is_world_process_zero():
            print_to_stderr(str(trainer.duplicates))
        return trainer

    trainer = run.train(build)
    trainer.save_model(training.output_dir)
    run.note(ended=run.result(trainer).as_dict())
    return trainer.report


def _in_fastest_dtype(base: Any, resumed: Path | None) -> Any:
    """The base in float32 if this CPU computes faster in it, or if the resumed run did.

    The prompts' keys and values are stored in the base's dtype, so they follow.
    """
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1  # processes might decide differently
    if base.device.type != "cpu" or base.dtype == torch.float32 or not alone:
        return base
    record = read_record(resumed) if resumed else None
    if record and "base_dtype" in record:
        return base if record["base_dtype"] == _name_of(base.dtype) else base.float()
    slowdown = loading.slowdown_of(base.dtype)
    if slowdown <= MUCH_SLOWER:
        return base
    print_to_stderr(
        f"{_name_of(base.dtype)} takes {slowdown:.1f} times as long as float32 on this CPU: the "
        f"base is computed in float32 (--dtype {_name_of(base.dtype)} leaves it as it is)"
    )
    return base.float()


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def rows_of(data: CPXDatasetConfig) -> tuple[list[Any], list[Any]]:
    """The rows of both sources, under the trainer's column names; the second may be empty."""
    if not data.data:
        raise InvalidInput("no data: give --data FILE, or the name of a data set on the hub")
    rows, held_out = (_rows(s, data) if s else [] for s in (data.data, data.evaluation_data))
    size = _evaluation_size(data, len(rows))
    if not held_out and size >= len(rows):
        raise InvalidInput(
            f"evaluation_size = {size}, and {data.data} has {len(rows)} rows: none are left "
            "to train on"
        )
    return rows, held_out


def split(
    data: CPXDatasetConfig, rows: int, held_out: int, seed: int
) -> tuple[Sequence[int], Sequence[int]]:
    """The rows to train on, and those to evaluate on: of the same source, or of the second."""
    if held_out:
        return range(rows)[: data.data_size], range(held_out)[: data.evaluation_size]
    order, size = list(range(rows)), _evaluation_size(data, rows)
    random.Random(seed).shuffle(order)
    return order[size:][: data.data_size], order[:size]


def _evaluation_size(data: CPXDatasetConfig, rows: int) -> int:
    return data.evaluation_size or max(1, rows // 10)


def _rows(source: str, data: CPXDatasetConfig) -> list[dict[str, Any]]:
    """Prompt and label alone: the file may have other columns with the names of a prompt's."""
    columns = {"prompt": data.prompt_column, "label": data.label_column}
    rows = read_prompts(source, columns, messages=data.messages_column)
    return [{"prompt": plain(row["prompt"]), "label": row["label"]} for row in rows]


def _digest(*datasets: PromptDataset) -> str:
    """A digest of the ids and labels."""
    content = [
        ([ids.tolist() for ids in dataset.ids], dataset.labels.tolist())
        for dataset in datasets
        if dataset.labels is not None
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
