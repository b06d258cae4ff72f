"""Selective training under transformers' Trainer and trl's: one line, after the trainer is made.

    trainer = SFTTrainer(model, args, train_dataset=rows)        # or transformers.Trainer
    make_selective(trainer, GradientConfig(ratio=0.25))
    trainer.train()

The schedule advances with the optimizer. Each checkpoint holds the state of the schedule and of the
draws, so a resumed run has the losses of an uninterrupted one; the log counts what was trained.
`SelectiveTraining` does the same as a callback, for trainers that compute their loss by calling the
model with labels; `SelectiveMixin` as a base class.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from pliant import adapters
from pliant.errors import InvalidInput
from pliant.gradients.config import GradientConfig
from pliant.gradients.model import Gradients, all_attached_to, attach
from pliant.gradients.selector import Router
from pliant.training import AdapterCheckpoint

PREFIX = "gradients/"
ROW_EXTRAS = ("loss_weights",)
LOGGED = (
    "ratio",
    "tokens_selected",
    "tokens_total",
    "loss_selected",
    "loss_unselected",
    "flops_of_standard",
)


class SelectiveTraining(AdapterCheckpoint):
    """Attaches when training begins (if nothing is attached), steps the schedule, saves, resumes
    and logs.

    It is an `AdapterCheckpoint`: no other is needed. A callback comes after the reporters
    (TensorBoard's, say): its figures reach `trainer.state.log_history` and the printed log, but not
    them. `make_selective` puts it first.
    """

    def __init__(
        self,
        config: GradientConfig | None = None,
        *,
        router: Router | None = None,
        resume_from: str | Path | None = None,
    ) -> None:
        super().__init__(resume_from)
        self.config, self.router = config, router

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any
    ) -> None:
        model = event["model"]
        _refuse_smoothing(args)
        gradients = attached_to(model) or attach(model, self.config, router=self.router)
        _refuse_another(gradients, self.config)
        if args.use_liger_kernel:  # it has just replaced our forward with its own
            put_outside(gradients)
        schedule = gradients.selector.schedule
        if not schedule.state()["by_hand"]:  # else each part of an accumulated batch is a step
            schedule.load_state({**schedule.state(), "by_hand": True})
        super().on_train_begin(args, state, control, model=model)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any
    ) -> None:
        model = event["model"]
        if gradients := attached_to(model):
            gradients.step()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any
    ) -> None:
        """Adds the figures to a log, the one moment at which the device is waited for."""
        model, logs = event["model"], event["logs"]
        gradients = attached_to(model)
        if gradients is None or "loss" not in logs:
            return
        figures = gradients.logged()
        logged = {PREFIX + key: figures[key] for key in LOGGED if key in figures}
        logs.update(logged)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(logged)


class SelectiveMixin:
    """For trainers that bypass the model's forward: `class MySFT(SelectiveMixin, SFTTrainer)`.

    The argument `selective` is the configuration; `trainer.gradients` is the adapter.
    """

    def __init__(
        self,
        *args: Any,
        selective: GradientConfig | None = None,
        router: Router | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        assert isinstance(self, Trainer)
        self.gradients = make_selective(self, selective, router=router)


def make_selective(
    trainer: Trainer,
    config: GradientConfig | None = None,
    *,
    router: Router | None = None,
    resume_from: str | Path | None = None,
) -> Gradients:
    """Make a trainer, of transformers or of trl, train on the selected tokens from now on.

    A model that already has gradients attached keeps them; then leave `config` out, or pass the
    same. `resume_from` is as in `AdapterCheckpoint`.
    """
    _refuse_smoothing(trainer.args)
    if callable(getattr(trainer, "compute_loss_func", None)):
        raise InvalidInput(
            "compute_loss_func computes the loss from every token's logits: leave it out, the "
            "model's own loss is that of the selected tokens"
        )
    _refuse_old_trl(trainer)
    model = trainer.model
    gradients = attached_to(model)
    if gradients is None:
        gradients = attach(model, config, router=router)
    else:
        _refuse_another(gradients, config)
        put_outside(gradients)
    assert gradients.count is not None
    gradients.count.pass_to(trainer)
    _keep_columns(trainer)
    callback = SelectiveTraining(config, router=router, resume_from=resume_from)
    handler = trainer.callback_handler
    rest = [c for c in handler.callbacks if not isinstance(c, SelectiveTraining)]
    handler.callbacks = [callback, *rest]  # two of them would count each step twice
    return gradients


def put_outside(gradients: Gradients) -> None:
    """Detach and attach again, around whatever has replaced the model's forward meanwhile."""
    base, name = gradients.base, gradients.name
    trainers = gradients.count.trainers if gradients.count else []
    gradients.detach()
    adapters.attach(base, gradients, name)
    assert gradients.count is not None
    for trainer in trainers:
        gradients.count.pass_to(trainer)


def _keep_columns(trainer: Trainer) -> None:
    """A Trainer removes the columns that are no arguments of the model's forward: loss weights and
    example ids."""
    trainer._set_signature_columns_if_needed()
    columns = trainer._signature_columns
    trainer._signature_columns = [*columns, *(c for c in ROW_EXTRAS if c not in columns)]


def attached_to(model: nn.Module) -> Gradients | None:
    """The adapter that selects this model's tokens, if there is one."""
    return next(iter(all_attached_to(model)), None)


def _refuse_smoothing(args: TrainingArguments) -> None:
    if args.label_smoothing_factor:
        raise InvalidInput(
            f"label_smoothing_factor = {args.label_smoothing_factor}: the Trainer then keeps the "
            "labels to itself and computes the loss of every token. Leave it at 0"
        )


def _refuse_old_trl(trainer: Trainer) -> None:
    """Before its fused head, trl read every token's logits from the model's output."""
    if any(kind.__module__.startswith("trl.") for kind in type(trainer).__mro__):
        from trl.trainer import utils

        if not hasattr(utils, "add_fused_lm_head"):
            raise InvalidInput("this trl is too old for selective training: pip install -U trl")


def _refuse_another(gradients: Gradients, config: GradientConfig | None) -> None:
    if config not in (None, gradients.config):
        raise InvalidInput(
            f"the model already trains by {gradients.config}, and now by {config}: leave one out, "
            "or call detach() first"
        )
