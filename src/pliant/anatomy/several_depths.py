"""The hidden states that a model would end with after several numbers of layers, in one run.

    states = states_after(model, [2, 6, 12], input_ids=ids)
    states[6]        # as run_first(model, 6, input_ids=ids).normed

Every layer runs once, up to the deepest; the end of the decoder (its final norm, a projection) runs
once for each depth, on the stored output of that layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from pliant.anatomy.anatomy import Anatomy
from pliant.anatomy.cache_copy import copy_state
from pliant.anatomy.decoder import last_hidden_state, run_decoder
from pliant.anatomy.depth import Walk
from pliant.anatomy.intercept import CALL, Handler, Target
from pliant.errors import InvalidInput


def states_after(
    model: nn.Module | Anatomy, depths: Sequence[int], **inputs: Any
) -> dict[int, Tensor]:
    """The decoder's last hidden state as if the model ended after k layers, for each k."""
    anatomy = model if isinstance(model, Anatomy) else Anatomy.of(model)
    most = len(anatomy.layers)
    if not depths or not all(1 <= k <= most for k in depths):
        raise InvalidInput(f"depths={list(depths)}: give numbers of layers from 1 to {most}")
    walk = _CollectWalk(anatomy, depths)
    decoded = run_decoder(anatomy, copy_state(inputs), handlers=walk.handlers())
    states = {max(depths): last_hidden_state(decoded)}
    for k in sorted(set(depths) - set(states)):
        decoded = run_decoder(anatomy, copy_state(inputs), handlers=walk.ending_after(k))
        states[k] = last_hidden_state(decoded)
    return states


class _CollectWalk(Walk):
    """Runs the first layers, stores the outputs of some, and skips the layers after the last."""

    def __init__(self, anatomy: Anatomy, depths: Sequence[int]) -> None:
        super().__init__(anatomy)
        self.depths = set(depths)
        self.outputs: dict[int, Any] = {}
        """By depth; copies, because later layers may write into them."""
        self.last: Any = None

    def handlers(self) -> dict[Target, Handler]:
        return {(layer, CALL): self._call_of(layer) for layer in self.layers}

    def ending_after(self, k: int) -> dict[Target, Handler]:
        """Every layer returns what layer k returned, so that the decoder ends with it."""

        def stored(original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            return copy_state(self.outputs[k])

        return {(layer, CALL): stored for layer in self.layers}

    def _store(self, depth: int) -> None:
        for k in self.depths - self.outputs.keys():
            if k <= depth:
                self.outputs[k] = copy_state(self.last)

    def _call_of(self, layer: nn.Module) -> Handler:
        def call(original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            depth = self.step_to(layer) + 1
            self._store(depth - 1)  # a model may skip the layer of that depth (Mllama does)
            if depth <= max(self.depths):
                self.last = original(*args, **kwargs)
                self._store(depth)
            return self.last

        return call
