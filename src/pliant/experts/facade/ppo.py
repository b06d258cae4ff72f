"""`SVF_PPOTrainer`: training by reward under the seed's name.

    trainer = SVF_PPOTrainer(model, tokenizer, output_dir="outputs")
    result = trainer.train_on_prompts(["what is 12+30?", ...], answers=["42", ...])

trl has removed its PPO trainer, which learned a value head beside the policy. In its place stands
GRPO: the same clipped objective, in which the mean reward of a group of answers to one prompt takes
the place of the value head's estimate. There is no copy of the model as a reference either: the
reference is the same model with the expert disabled.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from shutil import copyfile
from typing import Any

from pliant.errors import InvalidInput
from pliant.experts.training.config import RATE, ExpertTrainingConfig
from pliant.experts.training.run import ExpertResult, train_expert
from pliant.experts.training.task import hold_out
from pliant.experts.training.trainer import LOG
from pliant.training.terminal import Say, print_to_stderr

RewardFn = Callable[[str, str, Any], float]
"""`reward_fn(prompt, answer, reference)`"""
SMALL = 1e-3
"""Adam moves z by about the learning rate in a step: with less, a hundred steps on a line down to 0
change it by less than 5 %."""
TENSORBOARD = "TENSORBOARD_LOGGING_DIR"
"""Transformers takes the folder from the environment alone."""


def contains_answer(prompt: str, answer: str, reference: Any) -> float:
    """The seed's own reward: 1 if the reference occurs in the answer."""
    return float(str(reference) in answer)


class SVF_PPOTrainer:
    """Trains the singular values of a model by a reward, and nothing else.

    `batch_size` (prompts a step) and `learning_rate` replace those of `config`; without a `config`,
    4 prompts.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        config: ExpertTrainingConfig | None = None,
        *,
        output_dir: str | Path = "outputs",
        logging_dir: str | Path | None = None,
        batch_size: int | None = None,
        learning_rate: float | None = None,
        say: Say = print_to_stderr,
    ) -> None:
        self.model, self.tokenizer, self.say = model, tokenizer, say
        self.output_dir, self.logging_dir = Path(output_dir), logging_dir
        check_logging_dir(logging_dir)
        own = config or ExpertTrainingConfig(prompts=4)
        self.config = replace(
            own,
            prompts=own.prompts if batch_size is None else batch_size,
            learning_rate=own.learning_rate if learning_rate is None else learning_rate,
        )
        rate = self.config.learning_rate
        if rate is not None and rate < SMALL:
            say(
                f"learning rate {rate:g}: z starts at 1, and a step moves it by about this much "
                f"(default: {RATE:g} divided by the square root of the number of layers)"
            )

    def train_on_prompts(
        self,
        prompts: Sequence[Any],
        answers: Sequence[Any] | None = None,
        reward_fn: RewardFn = contains_answer,
        max_epochs: int = 1,
        resume: bool = False,
    ) -> ExpertResult:
        """Train on these prompts, each on average once an epoch; returns what it came to.

        A part of the prompts is held out to measure the reward on. The expert is in `output_dir`.
        The number of steps follows from the epochs, and that of the configuration is not used.
        """
        if answers is None and reward_fn is contains_answer:
            raise InvalidInput("the reward looks for the answers: give them, or another reward_fn")
        if answers is not None and len(answers) != len(prompts):
            raise InvalidInput(f"{len(prompts)} prompts and {len(answers)} answers: one for each")
        references = [None] * len(prompts) if answers is None else answers
        rows = [{"prompt": p, "answer": a} for p, a in zip(prompts, references, strict=True)]
        rows, held_out = hold_out(rows, self.config.seed)
        steps = math.ceil(len(rows) / self.config.prompts) * max_epochs
        config = replace(self.config, steps=steps, report_to=self._reporter())

        def reward(
            prompts: Sequence[Any], completions: Sequence[str], answer: Sequence[Any]
        ) -> list[float]:
            triples = zip(prompts, completions, answer, strict=True)
            return [reward_fn(*triple) for triple in triples]

        with _tensorboard_in(self.logging_dir):
            result = train_expert(
                self.model,
                self.tokenizer,
                rows,
                reward,
                config,
                folder=self.output_dir,
                held_out=held_out,
                resume=resume,
                say=self.say,
            )
        if self.logging_dir is not None:
            Path(self.logging_dir).mkdir(parents=True, exist_ok=True)
            copyfile(self.output_dir / LOG, Path(self.logging_dir) / LOG)
        return result

    def _reporter(self) -> str:
        """TensorBoard, if it is installed and there is a folder for it."""
        if self.logging_dir is None or find_spec("tensorboard") is None:
            return self.config.report_to
        return "tensorboard"


def check_logging_dir(folder: str | Path | None) -> None:
    """Refuse what is no folder, before training."""
    if folder is not None and Path(folder).exists() and not Path(folder).is_dir():
        raise InvalidInput(f"logging_dir = {str(folder)!r} is a file: name a folder")


@contextmanager
def _tensorboard_in(folder: str | Path | None) -> Iterator[None]:
    """Inside the block, TensorBoard's files go to this folder, if there is one."""
    before = os.environ.get(TENSORBOARD)
    if folder is not None:
        os.environ[TENSORBOARD] = str(folder)
    try:
        yield
    finally:
        os.environ.pop(TENSORBOARD, None)
        if before is not None:
            os.environ[TENSORBOARD] = before
