"""What a user may set of a training: how it learns, from which rows, and what is kept."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pliant.errors import InvalidInput

if TYPE_CHECKING:
    from transformers import TrainingArguments

LOSSES = ("bce", "ce", "regression")
PREFIXES = ("auto", "memory", "disk", "recompute")


@dataclass(frozen=True)
class CPXTrainingConfig:
    """How a scorer learns. Every field is a flag of `python -m pliant.complexity`."""

    cpx_token: str = "[CPX]"
    """The token's text: the tokenizer must have been made with it."""
    is_cpx_token_trainable: bool = True
    """Train the [CPX] rows; without, only the head (and LoRA, if there is any)."""
    num_labels: int | None = None
    """How many outputs the scorer has; none: as many as it has."""

    loss: Literal["bce", "ce", "regression"] = "bce"
    """bce: each label a probability of its own; ce: one class of several; regression: any number.
    Labels may be soft with bce (0.7) and ce (a vector of shares)."""
    class_weights: tuple[float, ...] = ()
    """bce: the weight of each output's positives; ce: the weight of each class; none: all 1."""
    label_smoothing: float = 0.0
    """So much of every label is spread evenly over the answers."""

    learning_rate: float = 1e-2
    """The head's."""
    rows_learning_rate: float | None = None
    """The [CPX] rows'; none: 18 times `learning_rate`, times the rows' root mean square."""
    lora_learning_rate: float | None = None
    """LoRA's, and that of a base that is trained; none: 0.3 times `learning_rate`."""
    weight_decay: float = 0.01
    """Of the head's and LoRA's matrices; never of the rows, of a bias or of the query."""
    num_epochs: int = 4
    batch_size: int = 32
    """Prompts a step, on each device."""
    evaluation_batch_size: int = 128
    gradient_accumulation_steps: int = 1
    max_grad_norm: float = 1.0
    scheduler: str = "cosine"
    """As transformers names them: linear, cosine, constant_with_warmup, ..."""
    warmup: float = 0.05
    """The share of the steps in which the learning rate rises."""
    patience: int | None = None
    """Stop after so many evaluations without a better loss, and keep the best."""
    gradient_checkpointing: bool = False
    """Nothing is left to save: of each prompt only the rows' activations are kept. Taken for a
    frozen base, where it changes nothing; refused for a trained one, whose cache it would drop."""
    seed: int = 0

    prefixes: Literal["auto", "memory", "disk", "recompute"] = "auto"
    """Where the prompts' keys and values are kept between epochs; auto: what measures cheapest.
    recompute: nowhere, each epoch computes them anew (without gradient, as the base is frozen)."""
    prefix_folder: str | None = None
    """The folder of stored prefixes; none: `prefixes` inside `output_dir`."""
    base_dropout: bool = False
    """Leave the frozen base's dropout on, as a plain loop in train mode would: no prefix can be
    kept then. Off, the base is in eval mode throughout."""
    train_base: bool = False
    """Train all of the base as well. No prefix can be kept then."""

    output_dir: str = "cpx"
    """Where checkpoints and the trained scorer go."""
    resume: bool = False
    """Go on from the last checkpoint in `output_dir`, if there is one (of the command line)."""
    save_epochs: bool = False
    """Write a checkpoint (kilobytes) after each epoch."""
    logging_steps: int = 50

    def __post_init__(self) -> None:
        _one_of("loss", self.loss, LOSSES)
        _one_of("prefixes", self.prefixes, PREFIXES)
        if self.num_labels is not None:
            _at_least_one("num_labels", self.num_labels)
        for name in ("batch_size", "evaluation_batch_size", "num_epochs", "logging_steps"):
            _at_least_one(name, getattr(self, name))
        _at_least_one("gradient_accumulation_steps", self.gradient_accumulation_steps)
        for name in ("learning_rate", "rows_learning_rate", "lora_learning_rate"):
            _not_negative(name, getattr(self, name))
        _not_negative("weight_decay", self.weight_decay)
        _not_negative("max_grad_norm", self.max_grad_norm)
        if not 0 <= self.seed < 2**32:
            raise InvalidInput(f"seed = {self.seed!r}: a whole number from 0 up to below 2**32")
        if self.patience is not None:
            _at_least_one("patience", self.patience)
        if not 0 <= self.label_smoothing < 1:
            raise InvalidInput(
                f"label_smoothing = {self.label_smoothing!r}: a share of at least 0 and below 1"
            )
        if not 0 <= self.warmup < 1:
            raise InvalidInput(f"warmup = {self.warmup!r}: a share of the steps, 0 up to below 1")
        for weight in self.class_weights:
            _not_negative("class_weights", weight)

    def training_arguments(self, evaluates: bool = False, **changes: Any) -> TrainingArguments:
        """What transformers' Trainer is told; `changes` are TrainingArguments of your own."""
        import torch
        from transformers import TrainingArguments

        saves = "epoch" if self.save_epochs or self.patience else "no"
        best: dict[str, Any] = {}
        if evaluates:
            best["eval_strategy"] = "epoch"
        if self.patience:
            if not evaluates:
                raise InvalidInput(
                    f"patience = {self.patience}: there is no evaluation to wait for; give rows "
                    "to evaluate on"
                )
            best |= {"load_best_model_at_end": True, "metric_for_best_model": "loss"}
        options: dict[str, Any] = {
            "output_dir": self.output_dir,
            "per_device_train_batch_size": self.batch_size,
            "per_device_eval_batch_size": self.evaluation_batch_size,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "num_train_epochs": self.num_epochs,
            "learning_rate": self.learning_rate,
            "weight_decay": self.weight_decay,
            "max_grad_norm": self.max_grad_norm,
            "lr_scheduler_type": self.scheduler,
            "warmup_steps": self.warmup,
            "seed": self.seed,
            "save_strategy": saves,
            "logging_steps": self.logging_steps,
            "remove_unused_columns": False,
            "label_names": ["labels"],
            "dataloader_pin_memory": torch.cuda.is_available(),
            "report_to": "none",
        }
        try:
            return TrainingArguments(**{**options, **best, **changes})
        except ValueError as error:
            raise InvalidInput(f"transformers refuses these settings: {error}") from error


@dataclass(frozen=True)
class CPXDatasetConfig:
    """Which rows a scorer learns from. Every field is a flag of `python -m pliant.complexity`."""

    data: str = ""
    """A JSONL or CSV file, or a data set on the hub."""
    evaluation_data: str | None = None
    """The same for evaluation; none: rows are held back from `data`."""
    prompt_column: str = "prompt"
    """The column of the prompts: texts, or lists of messages."""
    label_column: str = "label"
    """The column of the labels: 1 is hard (the model fails), 0 easy; or a probability, a class, or
    a list with one number for each output."""
    data_size: int | None = None
    """Train on so many rows; none: on all."""
    evaluation_size: int | None = None
    """Evaluate on so many rows; none: a tenth of `data`, or all of `evaluation_data`."""
    max_length: int | None = None
    """Longer prompts are an error that names the row; none: the model's own limit."""
    truncate: bool = False
    """Cut longer prompts at their beginning instead."""

    def __post_init__(self) -> None:
        for name in ("data_size", "evaluation_size", "max_length"):
            if (value := getattr(self, name)) is not None:
                _at_least_one(name, value)


def _one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise InvalidInput(f"{name} = {value!r}: give one of {', '.join(known)}")


def _at_least_one(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InvalidInput(f"{name} = {value!r}: give a whole number of at least 1")


def _not_negative(name: str, value: float | None) -> None:
    if value is not None and not (math.isfinite(value) and value >= 0):
        raise InvalidInput(f"{name} = {value!r}: give a number of at least 0")
