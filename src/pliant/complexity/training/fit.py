"""A training without files: prompts and labels in, a trained scorer out."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from torch import Tensor, nn
from transformers import PrinterCallback

from pliant.complexity.model import Complexity
from pliant.complexity.prefix_cache.policy import check_fits
from pliant.complexity.prefix_cache.store import PrefixStore, in_memory
from pliant.complexity.training.config import CPXTrainingConfig
from pliant.complexity.training.dataset import (
    PromptDataset,
    encode,
    ids_of,
    labels_of,
    texts_of,
)
from pliant.complexity.training.report import TrainingReport
from pliant.complexity.training.train_module import train_module_of
from pliant.complexity.training.trainer import CPXTrainer
from pliant.errors import InvalidInput


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
    config = _changed(config or CPXTrainingConfig(), changes)
    module = train_module_of(scorer, config.base_dropout)
    dataset = _dataset(module.scorer, prompts, labels, config)
    if prefixes is not None:
        check_fits(prefixes, module.prefilled, dataset.ids, module.scorer.rows.device)
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
    return in_memory(module.prefilled, ids, module.scorer.rows.device)


def _dataset(
    scorer: Complexity, prompts: Sequence[Any], labels: Any, config: CPXTrainingConfig
) -> PromptDataset:
    ids = ids_of(encode(scorer, scorer.tokenizer, prompts))
    values = labels.tolist() if isinstance(labels, Tensor) or hasattr(labels, "tolist") else labels
    if len(values) != len(ids):
        raise InvalidInput(
            f"{len(ids)} prompts and {len(values)} labels: give one label for each prompt"
        )
    targets = labels_of(values, loss=config.loss, outputs=scorer.config.outputs)
    return PromptDataset(ids, targets, texts_of(prompts))


def _changed(config: CPXTrainingConfig, changes: Mapping[str, Any]) -> CPXTrainingConfig:
    names = {field.name for field in fields(CPXTrainingConfig)}
    if unknown := sorted(changes.keys() - names):
        raise InvalidInput(f"{unknown[0]!r} is no setting of CPXTrainingConfig")
    return replace(config, **changes)
