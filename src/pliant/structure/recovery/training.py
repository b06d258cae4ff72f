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

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

from transformers import Trainer, TrainingArguments

from pliant.adapters import attached
from pliant.adapters.files import write_file
from pliant.adapters.fingerprint import fingerprint, is_packed
from pliant.adapters.hooks import is_off
from pliant.anatomy.find import unwrap
from pliant.data.collate import Collator
from pliant.errors import InvalidInput, UnsupportedModel, check_choice, check_whole
from pliant.structure.calibration import perplexity
from pliant.structure.exporting.export import RECORD
from pliant.structure.recovery.trained_weights import Train, take_own_memory, trainable
from pliant.structure.recovery.trainer import RecoveryTrainer, predictions
from pliant.training.arguments import training_arguments
from pliant.training.run import (
    TrainingResult,
    TrainingRun,
    check_folder,
    save_stock_model,
)
from pliant.training.terminal import Say, print_to_stderr
from pliant.training.texts import Texts

LEARNING_RATE = {"lora": 1e-3, "norms": 5e-3, "all": 1e-4}
SCHEDULE = {"lr_scheduler_type": "cosine", "warmup_steps": "0.05"}
DISTILL = 0.5
"""Of the loss, if there is a teacher and no other share is asked for."""
HELD_OUT = 20
"""Of the pieces of text, one in so many is held out to measure the loss on,"""
MOST_HELD_OUT = 64
"""but no more than this."""
ROWS = 8  # pieces in a batch that the loss is measured on


@dataclass(frozen=True)
class RecoveryConfig:
    """What is trained, and by what it is taught."""

    train: Train = "all"
    """All weights ("all"), low-rank matrices ("lora"), or vectors of norms and biases ("norms")."""
    rank: int = 16
    """Of the low-rank matrices."""
    distill: float = 0.0
    """The share of the loss that is the distance from the teacher's predictions, from 0 to 1; the
    rest is that of the text itself."""
    temperature: float = 1.0
    """Softens the predictions of the teacher and the student before they are compared."""

    def __post_init__(self) -> None:
        check_choice("train", self.train, get_args(Train))
        check_whole("rank", self.rank, 1)
        if not _is_number(self.distill) or not 0 <= self.distill <= 1:
            raise InvalidInput(f"distill = {self.distill!r}: give a share from 0 to 1")
        if not _is_number(self.temperature) or not 0 < self.temperature < math.inf:
            raise InvalidInput(f"temperature = {self.temperature!r}: give a number above 0")

    def arguments(self, folder: Path, settings: Mapping[str, str]) -> TrainingArguments:
        """The Trainer's, with a learning rate for what is trained unless the settings have one."""
        return training_arguments(folder, self.settings(settings))

    def settings(self, settings: Mapping[str, str]) -> dict[str, str]:
        rate = {"learning_rate": str(LEARNING_RATE[self.train])}
        return {**SCHEDULE, **rate, **settings}


@dataclass(frozen=True, eq=False)
class Engine:
    """Another way to compute the loss of the text: selective training, for one."""

    plan: Mapping[str, Any]
    """What the losses depend on, as JSON can hold it."""
    prepare: Callable[[Trainer, TrainingRun], Callable[[], None]]
    """Change the trainer, and return what undoes it after the training."""


@dataclass(frozen=True)
class RecoveryResult(TrainingResult):
    """What a recovery came to; losses are in nats per token of the held-out text."""

    train: str
    trained: int
    """How many numbers were trained."""
    before: float
    """The smaller model's held-out loss before the training."""
    after: float
    """The same of the model that was written."""
    teacher: float | None
    """The teacher's."""

    @property
    def recovered(self) -> float | None:
        """The share of the lost log-perplexity that is back; None if none is known to be lost."""
        if self.teacher is None or self.before <= self.teacher:
            return None
        return (self.before - self.after) / (self.before - self.teacher)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "recovered": self.recovered}

    def __str__(self) -> str:
        sentence = (
            f"{self.steps:,} steps on {self.trained:,} numbers ({self.train}) took the held-out "
            f"loss from {self.before:.4f} to {self.after:.4f}"
        )
        if self.teacher is None:
            return sentence
        share = "" if self.recovered is None else f"{self.recovered:.0%} of what was lost is back: "
        return f"{share}{sentence}, and the teacher's is {self.teacher:.4f}"

    def cells(self) -> list[list[str]]:
        """The rows of the final table: what, and how much."""
        whole = [] if self.teacher is None else [["of the teacher", f"{self.teacher:.4f}"]]
        back = [] if self.recovered is None else [["of what was lost", f"{self.recovered:.1%}"]]
        return [
            ["trained", f"{self.train}, {self.trained:,} numbers"],
            *super().cells(),
            ["held-out loss before", f"{self.before:.4f}"],
            ["held-out loss after", f"{self.after:.4f}"],
            *whole,
            *back,
        ]


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
    texts, held_out = (texts, held_out) if held_out is not None else split(texts)
    args = config.arguments(target, settings or {})
    plan = _plan(model, teacher, texts, held_out, config)
    plan["settings"] = config.settings(settings or {})
    plan |= {} if engine is None else {"engine": dict(engine.plan)}
    record = check_folder(target, resume)
    collate = Collator.of(tokenizer)
    batches = batches_of(held_out, collate)
    losses = (record or {}).get("losses") or _losses(model, teacher, batches)
    with trainable(model, config.train, config.rank, teacher, args.seed) as student:
        trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
        run = TrainingRun(args, plan, resume=resume, say=say)
        run.note(losses=losses)
        finish: list[Callable[[], None]] = []
        trainer = run.train(
            lambda: RecoveryTrainer(
                student,
                args,
                data_collator=collate,
                train_dataset=texts.pieces,
                distill=config.distill,
                temperature=config.temperature,
                teacher=partial(predictions, teacher) if config.distill else None,
                autocast=is_half(model),
                models_loss=engine is not None,
            ),
            lambda trainer: finish.append(engine.prepare(trainer, run)) if engine else None,
        )
        for undo in finish:
            undo()
    _save(student, tokenizer, args, teacher)
    after = loss_of(model, batches)
    result = RecoveryResult(
        **run.result(trainer, after).as_dict(),
        train=config.train,
        trained=trained,
        after=after,
        **losses,
    )
    run.note(ended=result.as_dict())
    _pass_on_record(source, target, result, args)
    return result


def _plan(
    model: Any, teacher: Any, texts: Texts, held_out: Texts, config: RecoveryConfig
) -> dict[str, Any]:
    """What the losses depend on, besides the Trainer's settings."""
    return {
        "model": identity(model),
        "teacher": None if teacher is None else identity(teacher),
        "content": texts.digest,
        "held-out text": held_out.digest,
        "config": asdict(config),
    }


def _losses(model: Any, teacher: Any, batches: Sequence[Any]) -> dict[str, float | None]:
    """Of the model before any training, and of the teacher."""
    return {
        "before": checked_loss(model, batches),
        "teacher": None if teacher is None else loss_of(teacher, batches),
    }


def checked_loss(model: Any, batches: Sequence[Any]) -> float:
    """The loss before any training."""
    before = loss_of(model, batches)
    if not math.isfinite(before):
        raise UnsupportedModel(
            f"the model's loss is {before} before any training: its weights are damaged"
        )
    return before


def batches_of(texts: Texts, collate: Collator) -> list[Any]:
    """The pieces, as batches that a loss is measured on."""
    starts = range(0, len(texts.pieces), ROWS)
    return [collate(texts.pieces[start : start + ROWS]) for start in starts]


def is_half(model: Any) -> bool:
    """Whether the model has weights of 16 bits."""
    return any(p.is_floating_point() and p.element_size() == 2 for p in model.parameters())


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


def split(texts: Texts) -> tuple[Texts, Texts]:
    """The pieces to train on, and evenly spread ones that are held out."""
    count = len(texts.pieces)
    if count < 2:
        raise InvalidInput(
            "the text is a single piece, and some must be held out: give more text, shorter "
            "pieces, or a text to evaluate on"
        )
    every = max(2, HELD_OUT if count >= HELD_OUT else count, -(-count // MOST_HELD_OUT))
    held_out = set(range(every // 2, count, every))
    return (
        Texts([p for i, p in enumerate(texts.pieces) if i not in held_out], texts.left_out),
        Texts([p for i, p in enumerate(texts.pieces) if i in held_out]),
    )


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


def loss_of(model: Any, batches: Sequence[Mapping[str, Any]]) -> float:
    return math.log(perplexity(model, batches))


def identity(model: Any) -> str:
    own = fingerprint(model)
    content = json.dumps([own.model, own.shapes, own.samples], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
