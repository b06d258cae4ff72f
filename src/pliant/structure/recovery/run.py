"""What both recoveries do: measure the model, train a student, and measure the model again.

`recover` and `recover_gated` decide which student is trained, by which teacher, and how the model
is written.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pliant.adapters.fingerprint import fingerprint
from pliant.data.collate import Collator
from pliant.errors import InvalidInput, UnsupportedModel
from pliant.structure.calibration import perplexity
from pliant.structure.recovery.config import RecoveryConfig
from pliant.structure.recovery.trainer import RecoveryTrainer, Teacher
from pliant.training.folder import check_folder, has_begun
from pliant.training.result import TrainingResult
from pliant.training.run import TrainingRun
from pliant.training.terminal import Say
from pliant.training.texts import Texts

HELD_OUT = 20
"""Of the pieces of text, one in so many is held out to measure the loss on,"""
MOST_HELD_OUT = 64
"""but no more than this."""
LEAST_LOST = 0.01
"""Nats a token, or 1 % of the perplexity: a share of less is a ratio of two roundings."""
ROWS = 8  # pieces in a batch that the loss is measured on


@dataclass(frozen=True)
class RecoveryResult(TrainingResult):
    """What a recovery came to; losses are in nats per token of the held-out text."""

    train: str
    trained: int
    """How many parameters were trained."""
    before: float
    """The smaller model's held-out loss before the training."""
    after: float
    """The same of the model that was written."""
    teacher: float | None
    """The teacher's."""

    @property
    def recovered(self) -> float | None:
        """The share of the lost log-perplexity that is back; None if none is known to be lost, or
        so little that a share of it says nothing."""
        if self.teacher is None or self.before - self.teacher < LEAST_LOST:
            return None
        return (self.before - self.after) / (self.before - self.teacher)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "recovered": self.recovered}

    def __str__(self) -> str:
        sentence = (
            f"{self.steps:,} {self.steps_word} on {self.trained:,} parameters ({self.train}) took "
            f"the held-out loss from {self.before:.4f} to {self.after:.4f}"
        )
        if self.teacher is None:
            return sentence
        if self.recovered is not None:
            share = f"{self.recovered:.0%} of what was lost is back"
        elif self.before <= self.teacher:
            share = "nothing was lost"
        else:
            share = "too little was lost (1 % of the perplexity) to say what share is back"
        return f"{share}: {sentence}, and the teacher's is {self.teacher:.4f}"

    def cells(self) -> list[list[str]]:
        """The rows of the final table: what, and how much."""
        whole = [] if self.teacher is None else [["of the teacher", f"{self.teacher:.4f}"]]
        back = [] if self.recovered is None else [["of what was lost", f"{self.recovered:.1%}"]]
        return [
            ["trained", f"{self.train}, {self.trained:,} parameters"],
            *super().cells(),
            ["held-out loss before", f"{self.before:.4f}"],
            ["held-out loss after", f"{self.after:.4f}"],
            *whole,
            *back,
        ]


class Recovery:
    """One recovery of `model` in a folder: measured with `measure`, then `train`, then `result`."""

    losses: dict[str, float | None]
    """`before` any training, and of the `teacher`."""
    trained: int
    run: TrainingRun
    trainer: RecoveryTrainer

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        texts: Texts,
        folder: Path,
        config: RecoveryConfig,
        resume: bool,
        held_out: Texts | None,
        settings: Mapping[str, str] | None,
        say: Say,
    ) -> None:
        self.model, self.config, self.resume, self.say = model, config, resume, say
        self.texts, self.held_out = (texts, held_out) if held_out is not None else split(texts)
        self.args = config.arguments(folder, settings or {})
        self.settings = config.settings(settings or {})
        record = check_folder(folder, resume)
        self.record = record if has_begun(folder) else None
        self.collate = Collator.of(tokenizer)
        pieces = self.held_out.pieces
        self.batches = [self.collate(pieces[i : i + ROWS]) for i in range(0, len(pieces), ROWS)]

    def plan(self, **facts: Any) -> dict[str, Any]:
        """What the losses depend on: these facts, and what every recovery depends on."""
        return {
            "model": identity(self.model),
            **facts,
            "content": self.texts.digest,
            "held-out text": self.held_out.digest,
            "config": asdict(self.config),
            "settings": self.settings,
        }

    def measure(self, teacher_loss: Callable[[], float | None]) -> None:
        """The losses before any training; a resumed run has them in its record."""
        if losses := (self.record or {}).get("losses"):
            self.losses = losses
            return
        before = self.loss_of(self.model)
        if not math.isfinite(before):
            raise UnsupportedModel(
                f"the model's loss is {before} before any training: its weights are damaged"
            )
        self.losses = {"before": before, "teacher": teacher_loss()}

    def train(
        self,
        student: Any,
        plan: Mapping[str, Any],
        teacher: Teacher,
        prepare: Callable[[RecoveryTrainer, TrainingRun], Any] | None = None,
    ) -> None:
        """Train those weights of the student that require a gradient.

        With `prepare`, which changes the trainer, the student itself computes the loss.
        """
        self.trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
        self.run = run = TrainingRun(self.args, plan, resume=self.resume, say=self.say)
        run.note(losses=self.losses)
        self.trainer = run.train(
            lambda: RecoveryTrainer(
                student,
                self.args,
                data_collator=self.collate,
                train_dataset=self.texts.pieces,
                distill=self.config.distill,
                temperature=self.config.temperature,
                teacher=teacher if self.config.distill else None,
                autocast=_is_half(student),
                models_loss=prepare is not None,
            ),
            lambda trainer: prepare(trainer, run) if prepare is not None else None,
        )

    def result(self) -> RecoveryResult:
        """Measures the trained model, and notes that the run has ended."""
        after = self.loss_of(self.model)
        result = RecoveryResult(
            **self.run.result(self.trainer, after).as_dict(),
            train=self.config.train,
            trained=self.trained,
            after=after,
            **self.losses,  # type: ignore[arg-type]
        )
        self.run.note(ended=result.as_dict())
        return result

    def loss_of(self, model: Any) -> float:
        """In nats per token of the held-out text."""
        return math.log(perplexity(model, self.batches))


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


def identity(model: Any) -> str:
    own = fingerprint(model)
    adapters = [own.adapters] if own.adapters else []
    content = json.dumps([own.model, own.shapes, own.samples, *adapters], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _is_half(model: Any) -> bool:
    """Whether the model has weights of 16 bits."""
    return any(p.is_floating_point() and p.element_size() == 2 for p in model.parameters())
