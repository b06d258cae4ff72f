"""The Trainer of recovery: it learns from the text, and from a teacher's predictions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from pliant.anatomy.find import device_of
from pliant.anatomy.modes import eval_mode
from pliant.structure.recovery.distillation import labelled, recovery_loss

Teacher = Callable[[dict[str, Any]], Tensor]
"""Gives the logits of a batch."""


class RecoveryTrainer(Trainer):
    """Trains on the text and on the predictions of a teacher, which is no part of the model."""

    def __init__(
        self,
        *args: Any,
        distill: float,
        temperature: float,
        teacher: Teacher | None,
        autocast: bool,
        models_loss: bool = False,
        **options: Any,
    ) -> None:
        """With `models_loss` the model itself computes the loss, as an engine changes it."""
        super().__init__(*args, **options)
        self.distill, self.temperature = distill, temperature
        self.teacher, self.autocast = teacher, autocast
        self.models_loss = models_loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        # bf16, since it needs no scaling of the loss.
        autocast = torch.autocast(
            inputs["input_ids"].device.type, torch.bfloat16, enabled=self.autocast
        )
        if self.models_loss:
            with autocast:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs.pop("labels")
        predictions = None if self.teacher is None else self.teacher(inputs)
        with autocast:
            outputs = model(**inputs, use_cache=False)
        loss = recovery_loss(
            outputs.logits,
            labels,
            predictions,
            distill=self.distill,
            temperature=self.temperature,
        )
        if num_items_in_batch is None:
            loss = loss / max(1, labelled(labels))
        else:  # of all batches between two updates, and of all processes
            together = self.args.average_tokens_across_devices
            loss = loss / num_items_in_batch * (self.accelerator.num_processes if together else 1)
        return (loss, outputs) if return_outputs else loss


@torch.no_grad()
def predictions(teacher: Any, inputs: dict[str, Any]) -> Tensor:
    """The logits of another model."""
    device = inputs["input_ids"].device
    if device_of(teacher) != device:
        teacher.to(device)
    with eval_mode(teacher):
        logits: Tensor = teacher(**inputs, use_cache=False).logits
    return logits
