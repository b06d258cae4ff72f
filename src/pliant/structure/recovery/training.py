"""Recovery: train a smaller model until it predicts almost as the whole one did.

    result = recover(smaller, tokenizer, texts(rows, tokenizer, 512), "recovered", teacher=model)
    print(result)

The smaller model is a stock one, as `export` writes it, so every step is cheaper by what was
removed. It is trained in place, and written to the run's folder in its own dtype. A few of its
weights are trained: low-rank matrices, the vectors of its norms, or all of it; weights of 16 bits
are trained in 32, since small steps would be rounded away. A teacher, which may share tensors with
the smaller model, is only read: it is never saved, trained or edited.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainingArguments

from pliant.adapters import attached
from pliant.adapters.fingerprint import is_packed
from pliant.adapters.hooks import is_off
from pliant.anatomy.find import unwrap
from pliant.errors import InvalidInput, UnsupportedModel
from pliant.files import write_file
from pliant.structure.exporting.export import RECORD
from pliant.structure.recovery.config import RecoveryConfig
from pliant.structure.recovery.run import Recovery, RecoveryResult, identity
from pliant.structure.recovery.trained_weights import take_own_memory, trainable
from pliant.structure.recovery.trainer import predictions
from pliant.training.run import TrainingRun, save_stock_model
from pliant.training.terminal import Say, print_to_stderr
from pliant.training.texts import Texts


@dataclass(frozen=True, eq=False)
class Engine:
    """Another way to compute the loss of the text: selective training, for one."""

    plan: Mapping[str, Any]
    """What the losses depend on, as JSON can hold it."""
    prepare: Callable[[Trainer, TrainingRun], Callable[[], None]]
    """Change the trainer, and return what undoes it after the training."""


def recover(
    model: Any,
    tokenizer: Any,
    texts: Texts,
    folder: str | Path,
    config: RecoveryConfig | None = None,
    teacher: Any = None,
    resume: bool = False,
    *,
    held_out: Texts | None = None,
    settings: Mapping[str, str] | None = None,
    engine: Engine | None = None,
    source: Path | None = None,
    say: Say = print_to_stderr,
) -> RecoveryResult:
    """Train `model` on `texts`, or resume that; write the trained model to `folder`.

    `settings` are fields of TrainingArguments as texts. Without `held_out`, some of the texts are
    held out. An `engine` computes the loss in place of recovery. The record of an export in the
    folder `source` is passed on to the new one.
    """
    config, target = config or RecoveryConfig(), Path(folder).expanduser()
    check_teacher(config, teacher is not None)
    check_engine(config, engine)
    _check_models(model, teacher)
    recovery = Recovery(model, tokenizer, texts, target, config, resume, held_out, settings, say)
    plan = recovery.plan(teacher=None if teacher is None else identity(teacher))
    plan |= {} if engine is None else {"engine": dict(engine.plan)}
    recovery.measure(lambda: None if teacher is None else recovery.loss_of(teacher))
    undo: list[Callable[[], None]] = []

    def prepare(trainer: Trainer, run: TrainingRun) -> None:
        assert engine is not None
        undo.append(engine.prepare(trainer, run))

    args = recovery.args
    with trainable(model, config.train, config.rank, teacher, args.seed) as student:
        teach = partial(predictions, teacher)
        recovery.train(student, plan, teach, prepare if engine is not None else None)
        for undo_engine in undo:
            undo_engine()
    _save(student, tokenizer, args, teacher)
    result = recovery.result()
    _pass_on_record(source, target, result, args)
    return result


def check_engine(config: RecoveryConfig, engine: Engine | None) -> None:
    """Refuse distillation by an engine that trains on some tokens."""
    if config.distill and engine is not None:
        raise InvalidInput(
            f"distill = {config.distill:g}: an engine that selects tokens computes the text's loss "
            "alone: give 0, with which the teacher only tells how much was lost"
        )


def check_teacher(config: RecoveryConfig, has_teacher: bool) -> None:
    """Refuse distillation without a teacher."""
    if config.distill and not has_teacher:
        raise InvalidInput(f"distill = {config.distill:g}: give a teacher to distill from, or 0")


# --- what is written ---------------------------------------------------------------------------


def _save(student: Any, tokenizer: Any, args: TrainingArguments, teacher: Any) -> None:
    """Write the stock model; every process merges its low-rank matrices."""
    bases = [p for name, p in student.named_parameters() if ".base_layer." in name]
    take_own_memory(bases, teacher)
    if args.should_save:
        save_stock_model(student, tokenizer, Path(str(args.output_dir)))
    elif hasattr(student, "merge_and_unload"):
        student.merge_and_unload()


def _pass_on_record(
    source: Path | None, target: Path, result: RecoveryResult, args: TrainingArguments
) -> None:
    record = None if source is None else source / RECORD
    if record is None or not record.is_file() or not args.should_save:
        return
    content = {**json.loads(record.read_bytes()), "recovery": result.as_dict()}
    write_file(target / RECORD, (json.dumps(content, indent=2) + "\n").encode())


# --- checks --------------------------------------------------------------------------------------


def _check_models(model: Any, teacher: Any) -> None:
    if unwrap(model) is not model:
        raise UnsupportedModel("the model is wrapped: recover the stock model inside it")
    if own := attached(model):
        raise UnsupportedModel(
            f"{', '.join(own)} is attached: recovery trains the smaller stock model that export "
            "writes, so export it first"
        )
    if is_packed(model):
        raise UnsupportedModel("the model is quantised: load it in 16 or 32 bits to recover it")
    if teacher is None:
        return
    if teacher is model:
        raise InvalidInput("the teacher is the model itself: give the model before pruning")
    if on := [name for name, adapter in attached(teacher).items() if not is_off(adapter)]:
        raise UnsupportedModel(
            f"{', '.join(on)} is attached to the teacher, so it is not the whole model: detach it, "
            "or call recover inside `with adapter.disabled():`"
        )
    models: tuple[Any, Any] = model, teacher
    check_vocabularies(*(m.config.get_text_config(decoder=True).vocab_size for m in models))


def check_vocabularies(ours: int, theirs: int) -> None:
    """Refuse a teacher that predicts other tokens."""
    if ours != theirs:
        raise InvalidInput(
            f"the teacher has a vocabulary of {theirs:,} tokens, and the model one of {ours:,}: "
            "give the model before pruning"
        )
