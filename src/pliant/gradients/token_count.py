"""The count of a step's tokens, for models whose own forward makes nothing of it.

A Trainer counts the labelled tokens of all parts of an accumulated step, and passes this on only to
models that say they take it. One that is attached to does: its loss is computed here. So it says
so as long as it is attached to; and what its own forward still computes (an evaluation, a loss of
another kind) is weighed here by its part of the step.
"""

from __future__ import annotations

import inspect
import weakref
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from pliant.data.collate import IGNORED

if TYPE_CHECKING:
    from transformers import Trainer

SAYS_SO = "accepts_loss_kwargs"
COUNT = "num_items_in_batch"


class TokenCount:
    """The model says that it takes the count, until `remove`."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.needed = not takes_count(model)
        """Whether the model's own forward must be spared the count."""
        self._before = vars(model).get(SAYS_SO)
        self._trainers: tuple[weakref.ref[Trainer], ...] = ()
        if self.needed:
            self.model.accepts_loss_kwargs = True  # type: ignore[assignment]

    def tell(self, trainer: Trainer) -> None:
        """One that was made before has asked the model already."""
        if self.needed and not trainer.model_accepts_loss_kwargs:
            trainer.model_accepts_loss_kwargs = True
            self._trainers = (*self._trainers, weakref.ref(trainer))

    @property
    def told(self) -> list[Trainer]:
        return [trainer for known in self._trainers if (trainer := known())]

    def remove(self) -> None:
        if not self.needed:
            return
        del self.model.accepts_loss_kwargs
        if self._before is not None:
            self.model.accepts_loss_kwargs = self._before
        for trainer in self.told:
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
    """What a Trainer would find."""
    said = getattr(model, SAYS_SO, None)
    if said is not None:
        return bool(said)
    parameters = inspect.signature(model.forward).parameters.values()
    return any(p.kind == p.VAR_KEYWORD for p in parameters)
