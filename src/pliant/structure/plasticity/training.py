"""Plasticity under transformers' Trainer: the cycle advances with the optimizer's steps.

    make_plastic(trainer, plasticity, batches, held_out)
    trainer.train()                 # or trainer.train(resume_from_checkpoint=True)
    print(plasticity.result())

Checkpoints hold the state of the cycle, so a resumed run ends as one that was not interrupted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pliant.anatomy.find import unwrap
from pliant.errors import InvalidInput
from pliant.structure.calibration import Batch
from pliant.structure.plasticity.model import Plasticity
from pliant.training import AdapterCheckpoint


def make_plastic(
    trainer: Trainer,
    plasticity: Plasticity,
    batches: Sequence[Batch],
    held_out: Sequence[Batch],
) -> None:
    """Run the cycle in `trainer`: heads are measured on `batches`, the rows' losses on `held_out`.

    Regrown heads get their own parameter group when the trainer makes its optimizer.
    """
    steps = plasticity.config.steps
    if unwrap(trainer.model) is not plasticity.base:
        raise InvalidInput("the trainer has another model than the one with this plasticity")
    if trainer.args.max_steps < steps:
        raise InvalidInput(
            f"max_steps = {trainer.args.max_steps}: the cycle takes {steps} steps, so set "
            f"TrainingArguments(max_steps={steps}) or more"
        )
    if trainer.lr_scheduler is not None:
        raise InvalidInput(
            "the trainer has a scheduler already, which would not know the parameter group of "
            "regrown heads: pass no optimizers=, or call own_group before you make the scheduler"
        )
    plasticity.measure_on(batches, held_out)
    _create_with_own_group(trainer, plasticity)
    callbacks = trainer.callback_handler.callbacks
    if not any(isinstance(callback, AdapterCheckpoint) for callback in callbacks):
        trainer.add_callback(AdapterCheckpoint())
    trainer.add_callback(PlasticityTraining(plasticity))


def _create_with_own_group(trainer: Trainer, plasticity: Plasticity) -> None:
    create: Any = trainer.create_optimizer

    def create_optimizer(*args: Any, **kwargs: Any) -> Optimizer:
        optimizer: Optimizer = create(*args, **kwargs)
        plasticity.own_group(optimizer, trainer.args.learning_rate)
        return optimizer

    trainer.create_optimizer = create_optimizer


class PlasticityTraining(TrainerCallback):
    """Calls the cycle before each step, around each update, and at the end."""

    def __init__(self, plasticity: Plasticity) -> None:
        self.plasticity = plasticity

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        # Checkpoints were restored by then, whatever the order of the callbacks.
        self.plasticity.begin_step()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.plasticity.before_update()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.plasticity.after_update()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.plasticity.begin_step()
