"""What a model is called with, as a batch: its inputs, what is to be predicted where, and the count
of a step's tokens.

A position t predicts token t + 1; B sequences of T positions.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pliant.data.collate import IGNORED
from pliant.errors import InvalidInput

if TYPE_CHECKING:
    from transformers import Trainer

EXTRAS = ("loss_weights", "num_items_in_batch")
"""What a batch may hold besides; the model itself never sees the first."""


@dataclass(frozen=True, eq=False)
class LabelledBatch:
    """One batch to train on."""

    inputs: dict[str, Any]
    """What the model itself is called with, without labels."""
    targets_BT: Tensor
    """What each position predicts; IGNORED where there is nothing to learn."""
    valid_BT: Tensor
    user_BT: Tensor | None
    """What each target's loss is multiplied with, where the data set says so."""
    items: Any
    """The labelled tokens of all batches of a step, where the trainer counted them."""
    tuples: bool
    shifted: bool
    """Whether the labels came as `shift_labels`, already aligned."""

    @property
    def count(self) -> Tensor | float:
        """What the sum of the losses is divided by."""
        return divisor(self.valid_BT, self.items)


def divisor(valid_BT: Tensor, items: Any) -> Tensor | float:
    """The number of labelled tokens: of the step, where it was counted, or else of this batch."""
    if items is None:
        return valid_BT.sum().clamp(min=1)
    return items.to(valid_BT.device) if isinstance(items, Tensor) else items


def named(
    forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The arguments of a call by name."""
    names = [
        p.name for p in inspect.signature(forward).parameters.values() if p.kind != p.VAR_KEYWORD
    ]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def source_of(inputs: Mapping[str, Any]) -> Tensor | None:
    """What the model reads: ids, or embeddings in their place."""
    ids = inputs.get("input_ids")
    return inputs.get("inputs_embeds") if ids is None else ids


def without_extras(inputs: dict[str, Any]) -> dict[str, Any]:
    """What the model itself may see of a call."""
    return {name: value for name, value in inputs.items() if name != "loss_weights"}


def is_labelled(inputs: Mapping[str, Any]) -> bool:
    return inputs.get("labels") is not None or inputs.get("shift_labels") is not None


def labelled_batch(inputs: dict[str, Any], aligned: bool = False) -> LabelledBatch:
    """Take a call apart. `aligned` labels are those of what each position predicts already."""
    inputs = dict(inputs)
    labels, shifted = inputs.pop("labels", None), inputs.pop("shift_labels", None)
    weights = inputs.pop("loss_weights", None)
    items = inputs.pop("num_items_in_batch", None)
    tuples = inputs.pop("return_dict", None) is False
    inputs.setdefault("use_cache", False)
    if aligned and shifted is None:
        shifted = labels
    targets_BT = following(labels) if shifted is None else shifted
    _check_shape(targets_BT, inputs)
    valid_BT = targets_BT != IGNORED
    return LabelledBatch(
        inputs,
        targets_BT,
        valid_BT,
        None
        if weights is None
        else _weights(torch.as_tensor(weights), targets_BT, shifted is None),
        items,
        tuples,
        shifted is not None,
    )


def following(values_BT: Tensor, fill: float = IGNORED) -> Tensor:
    """What each position predicts of these: the next one's, and `fill` at the end."""
    return torch.nn.functional.pad(values_BT[:, 1:], (0, 1), value=fill)


def _weights(weights: Tensor, targets_BT: Tensor, shift: bool) -> Tensor:
    """One number a row, or one a token (which then move as the labels do)."""
    weights = weights.to(targets_BT.device, torch.float32)
    if weights.shape == targets_BT.shape[:1]:
        return weights[:, None].expand(targets_BT.shape)
    if weights.shape == targets_BT.shape:
        return following(weights, 0.0) if shift else weights
    raise InvalidInput(
        f"loss_weights of shape {tuple(weights.shape)}: give one a row, "
        f"{tuple(targets_BT.shape[:1])}, or one a token, {tuple(targets_BT.shape)}"
    )


def _check_shape(targets_BT: Tensor, inputs: dict[str, Any]) -> None:
    source = source_of(inputs)
    if source is None:
        raise InvalidInput("there are neither input_ids nor inputs_embeds to train on")
    if targets_BT.shape != source.shape[:2]:
        raise InvalidInput(
            f"labels of shape {tuple(targets_BT.shape)} for inputs of {tuple(source.shape[:2])}: "
            "give one label a token (-100 where there is none)"
        )


# --- the count of a step's tokens -----------------------------------------------------------------

# A Trainer counts the labelled tokens of all parts of an accumulated step, and passes this on only
# to models that declare that they accept it. A model with this adapter does, because its loss is
# computed here; what its own forward still computes (an evaluation, a loss of another kind) is
# weighted here by its part of the step.

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
