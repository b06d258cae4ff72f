"""The keys and values of one pass, used by another: `Recording` stores and `Writing` updates them.

Both take the place of a layer's cache. Letters: B sequences of T positions, K of them live, H
heads, E features a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from pliant.errors import UnsupportedModel

Pair = tuple[Tensor, Tensor]


class Recording(DynamicCache):
    """Stores the keys and values that every layer attends to, and returns them unchanged."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = _NoStates()
        self.pairs: dict[int, Pair] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> Pair:
        self.pairs[layer_idx] = key_states, value_states
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


class Writing(DynamicCache):
    """All positions' keys and values: those of another pass, the live ones' written over them.

    The gradient goes into what is live; into the rest only if they came with a graph.
    """

    def __init__(self, pairs: dict[int, Pair], at_BK: Tensor, live_BK: Tensor, again: bool) -> None:
        super().__init__()
        self.layers = _NoStates()
        self.pairs = pairs
        self.at_B1K1 = at_BK[:, None, :, None]
        self.spare_B1K1 = None if bool(live_BK.all()) else ~live_BK[:, None, :, None]
        self.again = again
        """Whether a layer may run twice (checkpointing): then nothing is written in place."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> Pair:
        keys, values = self.pairs[layer_idx]
        return self._written(keys, key_states), self._written(values, value_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def _written(self, all_BHTE: Tensor, live_BHKE: Tensor) -> Tensor:
        if self.spare_B1K1 is not None:
            # A spare slot repeats a position: its gradient would count that position twice.
            live_BHKE = torch.where(self.spare_B1K1, live_BHKE.detach(), live_BHKE)
        at = self.at_B1K1.expand_as(live_BHKE)
        if self.again or not _is_ours_alone(all_BHTE):
            return all_BHTE.scatter(-2, at, live_BHKE)
        return all_BHTE.data.scatter_(-2, at, live_BHKE)


class _NoStates(list[Any]):
    """A layer that asks for more than keys and values has a state that positions cannot share."""

    def __getitem__(self, index: Any) -> Any:
        raise UnsupportedModel("it has layers that keep a running state instead of keys and values")


def _is_ours_alone(tensor: Tensor) -> bool:
    """Whether it can be written in place: it has no graph and shares its memory with nothing."""
    own = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return own and not tensor.requires_grad


def extended(pairs: dict[int, Pair], length: int) -> dict[int, Pair]:
    """Padded with zeros for later positions, which the second pass writes."""
    return {layer: (_longer(k, length), _longer(v, length)) for layer, (k, v) in pairs.items()}


def _longer(some_BHPE: Tensor, length: int) -> Tensor:
    b, h, p, e = some_BHPE.shape
    longer = some_BHPE.new_empty(b, h, length, e)
    longer[:, :, :p] = some_BHPE
    longer[:, :, p:] = 0
    return longer
