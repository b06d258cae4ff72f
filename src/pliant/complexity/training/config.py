"""What a user may set of a scorer's training: the model, how it learns, and from which rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pliant.complexity.config import Aggregation
from pliant.errors import InvalidInput, check_choice, check_whole, named_settings
from pliant.loading.dtypes import Dtype
from pliant.options import Flag

if TYPE_CHECKING:
    from transformers import TrainingArguments

Loss = Literal["bce", "ce", "regression"]
Prefixes = Literal["auto", "memory", "disk", "recompute"]
RATES = ("learning_rate", "rows_learning_rate", "lora_learning_rate")


@named_settings
@dataclass(frozen=True)
class CPXModelConfig:
    """The base, and the scorer on it. Every field is an option of `pliant train scorer`."""

    model_name: str = "nano-s"
    """An embedded model, a folder, or a name on the hub."""
    dtype: Dtype = "auto"
    """The weights' type; auto: the checkpoint's own, or float32 on a CPU that computes faster in
    it."""
    device: str | None = None
    """cpu, cuda, ...; none: the best there is."""
    rows: Annotated[int, Flag(group="Method")] = 1
    """The number of [CPX] positions after a prompt."""
    outputs: tuple[str, ...] = ()
    """The meaning of each output: score, gain, right:NAME, or names of your own; none: score."""
    aggregation: Aggregation = "last"
    """How several rows become one."""
    layer: int | None = None
    """Read the hidden states after this many layers; none: after the last."""
    bias: bool = True
    """Give the head a bias."""
    lora_rank: int = 0
    """The rank of a LoRA that acts on [CPX] positions only; 0: no LoRA."""
    lora_alpha: float | None = None
    """The LoRA's scale times its rank; none: twice the rank."""
    lora_targets: tuple[str, ...] = ()
    """The projections with the LoRA, by the ends of their names (q_proj, down_proj, ...); none:
    every one that sees all positions."""

    def __post_init__(self) -> None:
        for name in ("lora_alpha", "lora_targets"):
            if getattr(self, name) and not self.lora_rank:
                raise InvalidInput(
                    f"{name} = {getattr(self, name)!r}, and there is no LoRA: give lora_rank"
                )


@named_settings
@dataclass(frozen=True)
class CPXTrainingConfig:
    """How a scorer learns. Every field is an option of `pliant train scorer`."""

    cpx_token: str = "[CPX]"
    """The token's text, the same as the tokenizer's."""
    is_cpx_token_trainable: bool = True
    """Train the [CPX] rows; without, only the head (and LoRA, if there is any)."""
    num_labels: int | None = None
    """The number of the scorer's outputs; none: as the scorer has."""

    loss: Loss = "bce"
    """bce: each label a probability of its own; ce: one class of several; regression: any number.
    Labels may be soft with bce (0.7) and ce (a vector of shares)."""
    class_weights: tuple[float, ...] = ()
    """bce: the weight of each output's positives; ce: the weight of each class; none: all 1."""
    label_smoothing: float = 0.0
    """This share of every label is spread evenly over the answers."""

    learning_rate: float = 1e-2
    """Of the head."""
    rows_learning_rate: float | None = None
    """Of the [CPX] rows; none: 18 times `learning_rate`, times the rows' root mean square."""
    lora_learning_rate: float | None = None
    """Of LoRA, and of a base that is trained; none: 0.3 times `learning_rate`."""
    weight_decay: float = 0.01
    """For the matrices of the head and of LoRA; never for the rows, a bias or the query."""
    num_epochs: int = 4
    """Passes over the training rows."""
    batch_size: int = 32
    """Prompts a step, on each device."""
    evaluation_batch_size: int = 128
    """Prompts a batch in evaluations, on each device."""
    gradient_accumulation_steps: int = 1
    """Batches a step."""
    max_grad_norm: float = 1.0
    """Longer gradients are clipped to this norm; 0: never."""
    scheduler: str = "cosine"
    """The learning rate's schedule, as transformers names it: linear, cosine, ..."""
    warmup: float = 0.05
    """The share of the steps in which the learning rate rises."""
    patience: int | None = None
    """Stop after this many evaluations without a better loss, and restore the best; none: never."""
    gradient_checkpointing: bool = False
    """Accepted and without effect for a frozen base, which stores no activations of a prompt;
    refused for a trained one, whose cache it would drop."""
    seed: int = 0
    """Of the order of the rows, and of those that are held back."""

    prefixes: Prefixes = "auto"
    """Where the prompts' keys and values are stored between epochs; auto: the cheapest, measured.
    recompute: nowhere, each epoch computes them anew (without gradient, as the base is frozen)."""
    prefix_folder: str | None = None
    """The folder of stored prefixes; none: `prefixes` inside `output_dir`."""
    base_dropout: bool = False
    """Leave the frozen base's dropout on, as a plain loop in train mode would: then no prefix can
    be stored. Without it, the base stays in eval mode."""
    train_base: bool = False
    """Train the base as well. Then no prefix can be stored."""

    output_dir: str = "cpx"
    """The folder of the checkpoints and of the trained scorer."""
    resume: bool = False
    """Resume from the last complete checkpoint in `output_dir`, if there is one (command line)."""
    save_epochs: bool = False
    """Write a checkpoint (kilobytes) after each epoch."""
    logging_steps: int = 50
    """Log the loss every so many steps."""
    report_to: Literal["none", "tensorboard", "wandb"] = "none"
    """Also log to tensorboard (in `output_dir`/runs) or wandb."""

    def __post_init__(self) -> None:
        check_choice("loss", self.loss, get_args(Loss))
        check_choice("prefixes", self.prefixes, get_args(Prefixes))
        for name in ("batch_size", "evaluation_batch_size", "num_epochs", "logging_steps"):
            check_whole(name, getattr(self, name), least=1)
        check_whole("gradient_accumulation_steps", self.gradient_accumulation_steps, least=1)
        _check_optional(self, "num_labels", "patience")
        for name in (*RATES, "weight_decay", "max_grad_norm"):
            _not_negative(name, getattr(self, name))
        if not 0 <= self.seed < 2**32:
            raise InvalidInput(f"seed = {self.seed!r}: a whole number from 0 up to below 2**32")
        if not 0 <= self.label_smoothing < 1:
            raise InvalidInput(
                f"label_smoothing = {self.label_smoothing!r}: a share of at least 0 and below 1"
            )
        if not 0 <= self.warmup < 1:
            raise InvalidInput(f"warmup = {self.warmup!r}: a share of the steps, 0 up to below 1")
        for weight in self.class_weights:
            _not_negative("class_weights", weight)

    def training_arguments(self, evaluates: bool = False, **changes: Any) -> TrainingArguments:
        """As transformers' TrainingArguments; `changes` are fields of your own."""
        import torch
        from transformers import TrainingArguments

        saves = "epoch" if self.save_epochs or self.patience else "no"
        best: dict[str, Any] = {}
        if evaluates:
            best["eval_strategy"] = "epoch"
        if self.patience:
            if not evaluates:
                raise InvalidInput(
                    f"patience = {self.patience}: there is no evaluation; give rows to evaluate on"
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
            "report_to": self.report_to,
        }
        try:
            return TrainingArguments(**{**options, **best, **changes})
        except ValueError as error:
            raise InvalidInput(f"transformers refuses these settings: {error}") from error


@named_settings
@dataclass(frozen=True)
class CPXDatasetConfig:
    """Which rows a scorer learns from. Every field is an option of `pliant train scorer`."""

    data: str = ""
    """A JSONL or CSV file, or a data set on the hub (command line: needed)."""
    evaluation_data: str | None = None
    """The same for evaluation; none: rows are held back from `data`."""
    prompt_column: str = "prompt"
    """The column of the prompts: texts, or lists of messages; Alpaca's instruction and input if it
    is missing."""
    messages_column: str | None = None
    """The column of conversations, in place of prompts: what comes before the last answer is the
    prompt; none: messages or ShareGPT's conversations, if there are no prompts."""
    label_column: str = "label"
    """The column of the labels: 1 is hard (the model fails), 0 easy; or a probability, a class, or
    a list with one number for each output."""
    data_size: int | None = None
    """The number of training rows; none: all."""
    evaluation_size: int | None = None
    """The number of evaluation rows; none: a tenth of `data`, or all of `evaluation_data`."""
    max_length: int | None = None
    """Longer prompts are an error that names the row; none: the model's own limit."""
    truncate: bool = False
    """Truncate longer prompts on the left instead."""

    def __post_init__(self) -> None:
        _check_optional(self, "data_size", "evaluation_size", "max_length")


def _check_optional(config: Any, *names: str) -> None:
    for name in names:
        if (value := getattr(config, name)) is not None:
            check_whole(name, value, least=1)


def _not_negative(name: str, value: float | None) -> None:
    if value is not None and not (math.isfinite(value) and value >= 0):
        raise InvalidInput(f"{name} = {value!r}: give a number of at least 0")
