"""The count of a step's tokens, for models whose own forward ignores it.

A Trainer counts the labelled tokens of all parts of an accumulated step, and passes this on only to
models that declare that they accept it. A model with this adapter does, because its loss is
computed here; what its own forward still computes (an evaluation, a loss of another kind) is
weighted here by its part of the step.
"""

from __future__ import annotations

import inspect
import weakref
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from pliant.data.collate import IGNORED

if TYPE_CHECKING:
    from transformers import Trainer

ATTRIBUTE = "accepts_loss_kwargs"
COUNT = "num_items_in_batch"


class TokenCount:
    """The model declares that it accepts the count, until `remove`."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.needed = not takes_count(model)
        """Whether the model's own forward must be spared the count."""
        self._before = vars(model).get(ATTRIBUTE)
        self._trainers: tuple[weakref.ref[Trainer], ...] = ()
        if self.needed:
            self.model.accepts_loss_kwargs = True  # type: ignore[assignment]

    def pass_to(self, trainer: Trainer) -> None:
        """A trainer that exists already has asked the model before."""
        if self.needed and not trainer.model_accepts_loss_kwargs:
            trainer.model_accepts_loss_kwargs = True
            self._trainers = (*self._trainers, weakref.ref(trainer))

    @property
    def trainers(self) -> list[Trainer]:
        return [trainer for known in self._trainers if (trainer := known())]

    def remove(self) -> None:
        if not self.needed:
            return
        del self.model.accepts_loss_kwargs
        if self._before is not None:
            self.model.accepts_loss_kwargs = self._before
        for trainer in self.trainers:
            trainer.model_accepts_loss_kwargs = False

    def own(self, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the model itself gives, its loss being the part that a Trainer would add up."""
        items = kwargs.get(COUNT)
        if not self.needed or items is None:
            return forward(*args, **kwargs)
        output = forward(*args, **{k: v for k, v in kwargs.items() if k != COUNT})
        labels = kwargs.get("labels")
        if isinstance(labels, Tensor) and getattr(output, "loss", None) is not None:
            output.loss = output.loss * (self._counted(labels) / items)
        return output

    def _counted(self, labels: Tensor) -> Tensor:
        """As a Trainer counts them."""
        from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

        kind = LOSS_MAPPING.get(str(getattr(self.model, "loss_type", None)))
        config = getattr(self.model, "config", None)
        if kind is ForCausalLMLoss and not getattr(config, "is_encoder_decoder", False):
            labels = labels[..., 1:]
        return (labels != IGNORED).sum()


def takes_count(model: nn.Module) -> bool:
    """Whether a Trainer passes the count to this model."""
    declared = getattr(model, ATTRIBUTE, None)
    if declared is not None:
        return bool(declared)
    parameters = inspect.signature(model.forward).parameters.values()
    return any(p.kind == p.VAR_KEYWORD for p in parameters)
