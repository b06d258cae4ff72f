"""The whole backbone, forward and backward; only the head and the loss are of chosen rows alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from pliant.anatomy.decoder import last_hidden_state
from pliant.gradients.engines.layers import Arguments, Exit, at_each_layer
from pliant.gradients.engines.split_forward import SplitForward


def exact(
    split: SplitForward, inputs: dict[str, Any], exit_layer: int | None
) -> tuple[Any, Tensor]:
    """What the decoder returns, and the hidden states that scores are taken from."""
    exit = Exit(split.anatomy, exit_layer)

    def call(i: int, original: Callable[..., Any], given: Arguments) -> Any:
        return exit.see(i, given.call(original))

    if exit.layer is None:
        decoded = split.backbone(inputs)
    else:
        split.count(inputs)
        decoded = split.backbone(inputs, at_each_layer(split.anatomy, call))
    return decoded, exit.hidden(last_hidden_state(decoded))
