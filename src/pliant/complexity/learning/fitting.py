"""A training without files: prompts and labels in, the scorer trained in place."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from torch import Tensor, nn
from transformers import PrinterCallback

from pliant.complexity.learning.config import CPXTrainingConfig
from pliant.complexity.learning.learner import learner_of
from pliant.complexity.learning.lessons import Lessons, ids_of, labels_of, texts_of
from pliant.complexity.learning.report import TrainingReport
from pliant.complexity.model import Complexity
from pliant.complexity.stored.keeping import check_fits
from pliant.complexity.stored.prefixes import Stored, in_memory
from pliant.complexity.training import CPXTrainer, encode
from pliant.errors import InvalidInput


def fit(
    scorer: Complexity | nn.Module,
    prompts: Sequence[Any],
    labels: Any,
    *,
    evaluation: tuple[Sequence[Any], Any] | None = None,
    config: CPXTrainingConfig | None = None,
    prefixes: Stored | None = None,
    **changes: Any,
) -> TrainingReport:
    """Train a scorer in place and leave no files; `changes` are fields of CPXTrainingConfig.

    `prompts` are texts, messages or ids. `prefixes` are what `remember(scorer, prompts)` gave: for
    several scorers that read the same layer of one base, computed once.
    """
    config = _changed(config or CPXTrainingConfig(), changes)
    learner = learner_of(scorer, config.base_dropout)
    lessons = _lessons(learner.scorer, prompts, labels, config)
    if prefixes is not None:
        check_fits(prefixes, learner, lessons.ids)
        lessons.stored = prefixes.with_room(learner.scorer.config.rows)
    held = _lessons(learner.scorer, *evaluation, config) if evaluation is not None else None
    with tempfile.TemporaryDirectory() as folder:
        config = replace(config, output_dir=folder)
        args = config.training_arguments(
            evaluates=held is not None,
            disable_tqdm=True,
            logging_strategy="epoch",
            use_cpu=learner.scorer.rows.device.type == "cpu",
        )
        trainer = CPXTrainer(learner, args, config=config, train_dataset=lessons, eval_dataset=held)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    assert trainer.report is not None
    return trainer.report


def remember(scorer: Complexity | nn.Module, prompts: Sequence[Any]) -> Stored:
    """The prompts' keys and values, in memory, for `fit(..., prefixes=...)`."""
    learner = learner_of(scorer)
    ids = ids_of(encode(learner.scorer, learner.scorer.tokenizer, prompts))
    return in_memory(learner.prefilled, ids, learner.scorer.rows.device)


def _lessons(
    scorer: Complexity, prompts: Sequence[Any], labels: Any, config: CPXTrainingConfig
) -> Lessons:
    ids = ids_of(encode(scorer, scorer.tokenizer, prompts))
    values = labels.tolist() if isinstance(labels, Tensor) or hasattr(labels, "tolist") else labels
    if len(values) != len(ids):
        raise InvalidInput(f"{len(ids)} prompts and {len(values)} labels: one for each is wanted")
    wanted = labels_of(values, loss=config.loss, outputs=scorer.config.outputs)
    return Lessons(ids, wanted, texts_of(prompts))


def _changed(config: CPXTrainingConfig, changes: Mapping[str, Any]) -> CPXTrainingConfig:
    known = {field.name for field in fields(CPXTrainingConfig)}
    if unknown := sorted(changes.keys() - known):
        raise InvalidInput(f"{unknown[0]!r} is no setting of CPXTrainingConfig")
    return replace(config, **changes)
