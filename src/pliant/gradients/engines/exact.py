"""The whole backbone, forward and backward; only the head and the loss are of chosen rows alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from pliant.gradients.engines.layers import Arguments, Exit, at_each_layer
from pliant.gradients.engines.passage import Passage, hidden_of


def exact(passage: Passage, inputs: dict[str, Any], exit_layer: int | None) -> tuple[Any, Tensor]:
    """What the decoder returns, and the hidden states that scores are taken from."""
    exit = Exit(passage.anatomy, exit_layer)

    def call(i: int, original: Callable[..., Any], given: Arguments) -> Any:
        return exit.see(i, given.call(original))

    if exit.layer is None:
        decoded = passage.backbone(inputs)
    else:
        passage.count(inputs)
        decoded = passage.backbone(inputs, at_each_layer(passage.anatomy, call))
    return decoded, exit.hidden(hidden_of(decoded))
