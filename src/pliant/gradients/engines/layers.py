"""The arguments of each layer, reduced to the chosen positions.

The model's own code makes everything for whole sequences (embeddings, positions, rotations, masks
with their windows and documents, biases): what a layer is then called with is reduced to the
rows of the chosen positions. Letters: B sequences of T positions, K of them chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pliant.adapters.hooks import Guarded
from pliant.anatomy import Anatomy
from pliant.anatomy.decoder import last_hidden_state
from pliant.anatomy.intercept import CALL, FORWARD, Handler, Target
from pliant.errors import UnsupportedModel
from pliant.gradients.engines.split_forward import SplitForward, parameters_of

CACHES = ("past_key_values", "layer_past")
MASK = "attention_mask"
HIDDEN = "hidden_states"

Call = Callable[[int, Callable[..., Any], "Arguments"], Any]


class Arguments:
    """The arguments of one call of one layer, by name or by place, as they came."""

    def __init__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.layer, self.args, self.kwargs = layer, list(args), dict(kwargs)

    def give(self, names: tuple[str, ...], value: Any) -> None:
        """Call the layer with this value under the one of these names that it knows."""
        known = parameters_of(self.layer)
        name = next((name for name in names if name in known), None)
        if name is None:
            kind = type(self.layer).__name__
            raise UnsupportedModel(f"{kind} takes no {' or '.join(names)}")
        if known.index(name) < len(self.args):
            self.args[known.index(name)] = value
        else:
            self.kwargs[name] = value

    def get(self, name: str) -> Any:
        known = parameters_of(self.layer)
        if name in known and known.index(name) < len(self.args):
            return self.args[known.index(name)]
        return self.kwargs.get(name)

    @property
    def hidden(self) -> Tensor:
        """What comes from the layer before: every layer takes it first."""
        return self.args[0] if self.args else self.kwargs[HIDDEN]

    @hidden.setter
    def hidden(self, value: Tensor) -> None:
        if self.args:
            self.args[0] = value
        else:
            self.kwargs[HIDDEN] = value

    def map(self, change: Callable[[Any], Any]) -> None:
        """Change all but the hidden states."""
        first = self.args[:1]
        self.args = first + [change(value) for value in self.args[1:]]
        self.kwargs = {
            name: value if name == HIDDEN and not first else change(value)
            for name, value in self.kwargs.items()
        }

    def call(self, forward: Callable[..., Any]) -> Any:
        return forward(*self.args, **self.kwargs)


def at_each_layer(
    anatomy: Anatomy, call: Call, *, with_adapters: bool = False
) -> dict[Target, Handler]:
    """Handlers that pass each layer's forward, with its index, through `call`.

    The layer's hooks run around it; with `with_adapters` those of layers on which adapters act run
    inside it instead, for a gate compares a layer's input with its output.
    """

    def handler(index: int, layer: nn.Module) -> Handler:
        def answer(original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            return call(index, original, Arguments(layer, args, kwargs))

        return answer

    return {
        (layer, CALL if with_adapters and _has_adapters(layer) else FORWARD): handler(i, layer)
        for i, layer in enumerate(anatomy.layers)
    }


def _has_adapters(layer: nn.Module) -> bool:
    hooks = (*layer._forward_pre_hooks.values(), *layer._forward_hooks.values())
    return any(isinstance(hook, Guarded) for hook in hooks)


class Exit:
    """The hidden states after some of the layers, as if the model ended there."""

    def __init__(self, anatomy: Anatomy, layer: int | None) -> None:
        self.anatomy = anatomy
        self.layer = None if layer == len(anatomy.layers) else layer
        self._hidden: Tensor | None = None

    def see(self, i: int, answer: Any) -> Any:
        """Layer `i` has answered."""
        if i + 1 == self.layer:
            self._hidden = (answer[0] if isinstance(answer, tuple) else answer).detach()
        return answer

    @torch.no_grad()
    def hidden(self, last_BTD: Tensor) -> Tensor:
        """These, after the final norm; or the last layer's."""
        if self._hidden is None:
            return last_BTD
        return self._hidden if self.anatomy.norm is None else self.anatomy.norm(self._hidden)


class PositionSelector:
    """Selects the chosen positions of whatever has one entry for each position; once for each
    tensor, for layers share them."""

    def __init__(self, at_BK: Tensor, length: int) -> None:
        self.at_BK, self.length = at_BK, length
        self.every_B1 = torch.arange(at_BK.shape[0], device=at_BK.device)[:, None]
        self.selected: dict[int, tuple[Any, Any]] = {}

    def __call__(self, value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(self(part) for part in value)
        if not isinstance(value, Tensor) or value.dim() < 2:
            return value
        if id(value) not in self.selected:
            self.selected[id(value)] = value, self.rows(value)  # held, so that its id stays unique
        return self.selected[id(value)][1]

    def rows(self, value: Tensor) -> Tensor:
        """By its shape: (B, T, ...), (B, H, T, ...) or (..., B, T); else it is not of positions."""
        batch, many = self.at_BK.shape[0], (1, self.at_BK.shape[0])
        if value.dim() >= 4 and value.shape[0] in many and value.shape[2] == self.length:
            # A mask, or rotations for each head.
            return self._whole(value)[self.every_B1, :, self.at_BK].transpose(1, 2)
        if value.shape[0] in many and value.shape[1] == self.length:
            return self._whole(value)[self.every_B1, self.at_BK]
        # Counted from some side, and of several kinds; a bias for each head is no such thing.
        if value.shape[1:] == (batch, self.length) and not value.is_floating_point():
            return value.gather(2, self.at_BK.expand(value.shape[0], -1, -1))
        return value

    def _whole(self, value: Tensor) -> Tensor:
        return value.expand(self.at_BK.shape[0], *value.shape[1:])


def causal(length: int, at_BK: Tensor, eager: bool, dtype: torch.dtype) -> Tensor:
    """(B, 1, K, T): each chosen position sees itself and what is before it.

    Eager attention adds a mask as a number; all others take a boolean.
    """
    seen = torch.arange(length, device=at_BK.device) <= at_BK[:, None, :, None]
    if not eager:
        return seen
    lowest = torch.finfo(dtype).min
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, lowest)


def exact(
    split: SplitForward, inputs: dict[str, Any], exit_layer: int | None
) -> tuple[Any, Tensor]:
    """The "exact" engine: the full backbone, forward and backward; only the head and the loss are
    of chosen rows. Returns the decoder's output and the hidden states that scores are computed
    from."""
    exit = Exit(split.anatomy, exit_layer)

    def call(i: int, original: Callable[..., Any], given: Arguments) -> Any:
        return exit.see(i, given.call(original))

    if exit.layer is None:
        decoded = split.backbone(inputs)
    else:
        split.count(inputs)
        decoded = split.backbone(inputs, at_each_layer(split.anatomy, call))
    return decoded, exit.hidden(last_hidden_state(decoded))
