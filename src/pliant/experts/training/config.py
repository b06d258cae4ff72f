"""What a user may set of an expert's training by reward."""

from __future__ import annotations

import math
import os
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

from pliant.errors import InvalidInput, check_choice, check_whole, named_settings
from pliant.experts.config import Parts, SVFConfig
from pliant.training.arguments import check_reporters

if TYPE_CHECKING:
    from trl import GRPOConfig, RLOOConfig

Method = Literal["grpo", "rloo", "reinforce"]
Schedule = Literal["constant", "linear", "cosine"]
RATE = 0.02
"""The default learning rate for one layer. What the layers change adds up as their square root."""
# benchmarks/expert_facts.py (30 layers) and docs/experts-training.md (4 layers)
OUTSIDE_THE_PLAN = ("batch_size", "logging_steps", "save_steps", "report_to")
"""What may differ when a run is resumed."""


@named_settings
@dataclass(frozen=True, kw_only=True)
class ExpertTrainingConfig:
    """How an expert learns. Every field is an option of `pliant expert train`."""

    method: Method = "grpo"
    """grpo: each answer against its group, clipped as in PPO; rloo: against the mean of the others,
    clipped for whole answers; reinforce: every answer by its own reward (right +1, wrong -1), as
    published."""
    steps: int = 60
    """Updates of the expert."""
    prompts: int = 8
    """Different prompts a step."""
    group: int = 8
    """Sampled answers to each of them."""
    learning_rate: float | None = None
    """Of Adam, which moves each number by about this much in a step. A singular value counts 1 at
    first, so an expert needs far more than full fine-tuning does. None: 0.02 divided by the square
    root of the number of layers."""
    schedule: Schedule = "linear"
    """How the learning rate goes on: constant, or down to 0 as a line or a cosine."""
    beta: float = 0.1
    """The weight of the distance (KL) from the base model; 0: none."""
    temperature: float = 1.0
    """Of the sampled answers; above 0, since answers without chance teach nothing."""
    max_new_tokens: int = 64
    """The longest answer, in tokens."""
    updates: int = 1
    """Updates for each batch of answers; with several, the clipping begins to matter."""
    max_grad_norm: float = 1.0
    """Longer gradients are clipped to this norm; 0: never."""
    exploration: float = 0.1
    """The share of prompts drawn evenly, and not by how much they have to teach; 1: all."""
    batch_size: int = 64
    """Answers in one forward with gradient, on each device, at most."""
    chat: bool = True
    """Write a prompt that is a text with the chat template, if the tokenizer has one."""
    seed: int = 0
    """Of the prompts and of the sampled answers."""

    parts: Parts = "mlp"
    """The projections that change: mlp, attention or all; with all of them, an expert learns more
    and forgets more."""
    rank: int | None = None
    """The largest singular values of each matrix that may change; none: all."""

    logging_steps: int = 5
    """Log every so many steps."""
    save_steps: int = 25
    """Write a checkpoint (kilobytes) every so many steps."""
    report_to: str = "none"
    """Log to tensorboard or wandb as well; log.jsonl is always written."""

    def __post_init__(self) -> None:
        check_choice("method", self.method, get_args(Method))
        check_choice("schedule", self.schedule, get_args(Schedule))
        check_choice("parts", self.parts, get_args(Parts))
        for name in ("steps", "prompts", "max_new_tokens", "updates", "batch_size"):
            check_whole(name, getattr(self, name), 1)
        for name in ("logging_steps", "save_steps"):
            check_whole(name, getattr(self, name), 1)
        check_whole("group", self.group, 2)
        check_whole("seed", self.seed, 0)
        if self.seed >= 2**32:  # numpy's limit, which transformers would report in the run
            raise InvalidInput(f"seed = {self.seed}: give a number below 2**32")
        if self.rank is not None:
            check_whole("rank", self.rank, 1)
        for name in ("learning_rate", "temperature"):
            if getattr(self, name) is None and name == "learning_rate":
                continue
            if not self._is_number(name) or getattr(self, name) <= 0:
                raise InvalidInput(f"{name} = {getattr(self, name)!r}: give a number above 0")
        for name in ("beta", "max_grad_norm"):
            if not self._is_number(name) or getattr(self, name) < 0:
                raise InvalidInput(f"{name} = {getattr(self, name)!r}: give a number of at least 0")
        if not self._is_number("exploration") or not 0 <= self.exploration <= 1:
            raise InvalidInput(f"exploration = {self.exploration!r}: give a share from 0 to 1")

    def _is_number(self, name: str) -> bool:
        value = getattr(self, name)
        return isinstance(value, (int, float)) and math.isfinite(value)

    @property
    def expert(self) -> SVFConfig:
        """Of the expert itself, as PEFT has it."""
        return SVFConfig(parts=self.parts, rank=self.rank)

    def resolved(self, layers: int) -> Self:
        """With the default learning rate of a model with so many layers, unless one is set."""
        rate = RATE / math.sqrt(layers) if self.learning_rate is None else self.learning_rate
        return replace(self, learning_rate=rate)

    @property
    def plan(self) -> dict[str, Any]:
        """What the result depends on."""
        return {k: v for k, v in vars(self).items() if k not in OUTSIDE_THE_PLAN}

    def arguments(self, folder: Path, **changes: Any) -> GRPOConfig | RLOOConfig:
        """As trl's own configuration; `changes` are fields of it."""
        try:
            import trl
        except ImportError as error:
            raise InvalidInput("training by reward needs trl: pip install 'pliant[rl]'") from error
        check_reporters([self.report_to])
        kind: Any = trl.RLOOConfig if self.method == "rloo" else trl.GRPOConfig
        settings = {**self._settings(folder), **changes}
        try:
            with warnings.catch_warnings():  # trl itself sets what transformers has renamed
                warnings.simplefilter("ignore", FutureWarning)
                return kind(**settings)
        except (ValueError, ImportError) as error:
            raise InvalidInput(f"transformers or trl refuses these settings: {error}") from error

    def _settings(self, folder: Path) -> dict[str, Any]:
        processes = _processes()
        answers, rest = divmod(self.prompts * self.group, processes)
        if rest:
            raise InvalidInput(
                f"{self.prompts} prompts of {self.group} answers cannot be shared by {processes} "
                "processes: give another number of prompts"
            )
        at_once = max(n for n in range(1, answers + 1) if answers % n == 0 and n <= self.batch_size)
        return {
            "output_dir": str(folder),
            "max_steps": self.steps,
            "learning_rate": self.resolved(1).learning_rate,
            "lr_scheduler_type": self.schedule,
            "weight_decay": 0.0,
            "max_grad_norm": self.max_grad_norm,
            "beta": self.beta,
            "temperature": self.temperature,
            "num_generations": self.group,
            "max_completion_length": self.max_new_tokens,
            "num_iterations": self.updates,
            "per_device_train_batch_size": at_once,
            "gradient_accumulation_steps": answers // at_once,
            "seed": self.seed,
            "logging_steps": self.logging_steps,
            "save_steps": self.save_steps,
            "save_total_limit": 2,
            "report_to": self.report_to,
            "bf16": False,  # the base computes in its own dtype
            "gradient_checkpointing": False,
            "disable_dropout": True,
            "disable_tqdm": True,
            **_on_cpu(processes),
        }


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _on_cpu(processes: int) -> dict[str, Any]:
    """Without an accelerator: accelerate gathers from several processes only if told so."""
    import torch

    if torch.accelerator.is_available():
        return {}
    return {"use_cpu": True, **({"ddp_backend": "gloo"} if processes > 1 else {})}
