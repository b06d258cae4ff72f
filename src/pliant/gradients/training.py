"""Selective training under transformers' Trainer and trl's: one line, after the trainer is made.

    trainer = SFTTrainer(model, args, train_dataset=rows)        # or transformers.Trainer
    make_selective(trainer, GradientConfig(ratio=0.25))
    trainer.train()

The schedule advances with the optimizer; what was drawn and how far the schedule is lies beside
each checkpoint, and a resumed run goes on as if it had never stopped; the log says what was
trained. `SelectiveTraining` is the same as a callback alone, for trainers that compute their loss
by calling the model with labels; `SelectiveMixin` the same as a base class.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from pliant import adapters
from pliant.errors import InvalidInput
from pliant.gradients import columns
from pliant.gradients.config import GradientConfig
from pliant.gradients.model import Gradients, attach
from pliant.gradients.selecting import Reference, Router
from pliant.training import AdapterCheckpoint

PREFIX = "gradients/"
LOGGED = (
    "ratio",
    "tokens_selected",
    "tokens_total",
    "loss_selected",
    "loss_unselected",
    "flops_of_standard",
)


class SelectiveTraining(AdapterCheckpoint):
    """Attaches when training begins (if nothing is), steps the schedule, saves, resumes and logs.

    It is an `AdapterCheckpoint`, too: no other is needed. As a callback it comes after those that
    report (TensorBoard's, say), so its figures reach `trainer.state.log_history` and what is
    printed, but not them; `make_selective` puts it first.
    """

    def __init__(
        self,
        config: GradientConfig | None = None,
        *,
        reference: Reference | None = None,
        router: Router | None = None,
        resume_from: str | Path | None = None,
    ) -> None:
        super().__init__(resume_from)
        self.config, self.reference, self.router = config, reference, router

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        assert model is not None
        _refuse_smoothing(args)
        gradients = attached_to(model) or attach(
            model, self.config, reference=self.reference, router=self.router
        )
        _refuse_another(gradients, self.config)
        if args.use_liger_kernel:  # which has just put a forward of its own in place of ours
            put_outside(gradients)
        schedule = gradients.selector.schedule
        if not schedule.state()["by_hand"]:  # or each part of the first step's batch were a step
            schedule.take({**schedule.state(), "by_hand": True})
        super().on_train_begin(args, state, control, model)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        assert model is not None
        if gradients := attached_to(model):
            gradients.step()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Beside a step's own loss: the only moment at which the device is waited for."""
        assert model is not None
        gradients = attached_to(model)
        if gradients is None or logs is None or "loss" not in logs:
            return
        figures = gradients.logged()
        told = {PREFIX + key: figures[key] for key in LOGGED if key in figures}
        logs.update(told)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(told)


class SelectiveMixin:
    """For trainers that go past the model's forward: `class MySFT(SelectiveMixin, SFTTrainer)`.

    The configuration is the argument `selective`; what is attached, `trainer.gradients`.
    """

    def __init__(
        self,
        *args: Any,
        selective: GradientConfig | None = None,
        reference: Reference | None = None,
        router: Router | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        assert isinstance(self, Trainer)
        self.gradients = make_selective(self, selective, reference=reference, router=router)


def make_selective(
    trainer: Trainer,
    config: GradientConfig | None = None,
    *,
    reference: Reference | None = None,
    router: Router | None = None,
    resume_from: str | Path | None = None,
) -> Gradients:
    """Let a trainer, of transformers or of trl, train on some tokens from now on.

    A model that was attached to before is brought under this trainer as it is; then `config` is
    left out, or the same. `resume_from` is as in `AdapterCheckpoint`.
    """
    _refuse_smoothing(trainer.args)
    if callable(getattr(trainer, "compute_loss_func", None)):
        raise InvalidInput(
            "compute_loss_func computes the loss from every token's logits: leave it out, the "
            "model's own loss is that of the chosen tokens"
        )
    _refuse_old_trl(trainer)
    model = trainer.model
    gradients = attached_to(model)
    if gradients is None:
        gradients = attach(model, config, reference=reference, router=router)
    else:
        _refuse_another(gradients, config)
        put_outside(gradients)
    _tell(gradients, trainer)
    columns.keep(trainer)
    callback = SelectiveTraining(
        config, reference=reference, router=router, resume_from=resume_from
    )
    handler = trainer.callback_handler
    others = [one for one in handler.callbacks if not isinstance(one, SelectiveTraining)]
    handler.callbacks = [callback, *others]  # two of them would count each step twice
    return gradients


def put_outside(gradients: Gradients) -> None:
    """Off, and on again: around whatever took the place of the model's forward meanwhile."""
    base, name = gradients.base, gradients.name
    told = gradients.count.told if gradients.count else []
    gradients.detach()
    adapters.attach(base, gradients, name)
    for trainer in told:
        _tell(gradients, trainer)


def _tell(gradients: Gradients, trainer: Trainer) -> None:
    assert gradients.count is not None
    gradients.count.tell(trainer)


def attached_to(model: nn.Module) -> Gradients | None:
    """What chooses this model's tokens, if anything does."""
    kinds = (one for one in adapters.attached(model).values() if isinstance(one, Gradients))
    return next(kinds, None)


def _refuse_smoothing(args: TrainingArguments) -> None:
    if args.label_smoothing_factor:
        raise InvalidInput(
            f"label_smoothing_factor = {args.label_smoothing_factor}: the Trainer then takes the "
            "labels from the model and computes the loss of every token itself. Leave it at 0"
        )


def _refuse_old_trl(trainer: Trainer) -> None:
    """Before its fused head, trl read the logits of every token from what the model gave."""
    if any(kind.__module__.startswith("trl.") for kind in type(trainer).__mro__):
        from trl.trainer import utils

        if not hasattr(utils, "add_fused_lm_head"):
            raise InvalidInput("this trl is too old for selective training: pip install -U trl")


def _refuse_another(gradients: Gradients, config: GradientConfig | None) -> None:
    if config not in (None, gradients.config):
        raise InvalidInput(
            f"the model already trains by {gradients.config}, and now by {config}: leave one out, "
            "or detach() what is attached"
        )
