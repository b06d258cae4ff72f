"""A model's first layers as a router: logits for a fraction of its forward, and no weights at all.

    router = create_truncated_router(model, num_layers=4)
    logits = router(input_ids, attention_mask=mask)

It is the model's own forward that runs, with its own embeddings, masks, positions, norm and head:
after the first k layers the others hand the hidden state through. So at full depth the router is
the model, on every architecture; and it has no parameters and no state of its own.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from pliant.anatomy import Anatomy
from pliant.anatomy.intercept import CALL, Handler, Target, intercept
from pliant.errors import InvalidInput, UnsupportedModel
from pliant.gradients.facade.seed import logits_of


class RouterWarning(UserWarning):
    """A router is the whole model, and as expensive."""


def create_truncated_router(model: nn.Module, num_layers: int = 2) -> TruncatedRouter:
    """The first `num_layers` layers of `model`, its norm and its head, as `router(input_ids)`."""
    return TruncatedRouter(model, num_layers)


class TruncatedRouter(nn.Module):
    """Gives logits (B, T, V) for what the model itself takes. Shares all with the model.

    A model whose layers are not found, or not run once each and in order, is run whole, which a
    warning says.
    """

    def __init__(self, model: nn.Module, num_layers: int = 2) -> None:
        super().__init__()
        # Inside a list the model is no part of it: no weights are listed or saved twice.
        self._whole = [model]
        self._anatomy: list[Anatomy] = []
        self.num_layers = num_layers
        try:
            self._anatomy = [Anatomy.of(model)]
        except UnsupportedModel as error:
            self._pass_through(str(error))
            return
        depth = len(self._anatomy[0].layers)
        if isinstance(num_layers, bool) or not isinstance(num_layers, int) or num_layers < 1:
            raise InvalidInput(f"num_layers = {num_layers!r}: give 1 to {depth}")
        if num_layers > depth:
            raise InvalidInput(
                f"num_layers = {num_layers}: {type(model).__name__} has {depth}, so give 1 to "
                f"{depth}"
            )

    @property
    def of(self) -> nn.Module:
        """The model whose layers these are."""
        return self._whole[0]

    @property
    def passthrough(self) -> bool:
        """Whether the whole model is the router."""
        return not self._anatomy

    def forward(self, input_ids: Tensor | None = None, **inputs: Any) -> Tensor:
        model = self._whole[0]
        if input_ids is not None:
            inputs["input_ids"] = input_ids
        if "use_cache" in inspect.signature(model.forward).parameters:
            inputs.setdefault("use_cache", False)
        if self._anatomy:
            try:
                with intercept(_Walk(self._anatomy[0], self.num_layers).handlers()):
                    return logits_of(model(**inputs))
            except UnsupportedModel as error:
                self._anatomy = []
                self._pass_through(str(error))
        return logits_of(model(**inputs))

    def extra_repr(self) -> str:
        kind = type(self._whole[0]).__name__
        return f"the whole {kind}" if self.passthrough else f"{self.num_layers} layers of {kind}"

    def _pass_through(self, reason: str) -> None:
        warnings.warn(
            f"the router is the whole {type(self._whole[0]).__name__}, at the cost of its whole "
            f"forward: {reason}",
            RouterWarning,
            stacklevel=4,
        )


class _Walk:
    """One forward in which only the first k layers are computed."""

    def __init__(self, anatomy: Anatomy, k: int) -> None:
        self.anatomy, self.k = anatomy, k
        self.at, self.left = -1, None

    def handlers(self) -> dict[Target, Handler]:
        layers = enumerate(self.anatomy.layers)
        return {(layer, CALL): self._call_of(index) for index, layer in layers}

    def _call_of(self, index: int) -> Handler:
        def call(original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            if index <= self.at:
                raise UnsupportedModel(
                    f"it runs layer {index} after layer {self.at}, not each once and in order"
                )
            self.at = index
            if index < self.k:
                self.left = original(*args, **kwargs)
            return self.left

        return call
