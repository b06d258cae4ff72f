"""What CPXCausalLM returns: unpacked it is two things, by key and index it is a ModelOutput."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

from pliant.prefill import Prefilled


@dataclass
class CPXOutput(ModelOutput):
    """`logits, outputs = model(...)`; `loss` is there by name, and as the first by index."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    """(B, labels), the scorer's."""
    outputs: CausalLMOutputWithPast | None = None
    """The base's own, for the prompts."""

    def __iter__(self) -> Iterator[Any]:
        return iter((self.logits, self.outputs))


def base_output(ran: Prefilled) -> CausalLMOutputWithPast:
    """What the base said of the prompts; no cache where they had to run one length at a time."""
    assert ran.logits is not None
    cache = ran.cache if len(ran.parts) == 1 else None
    return CausalLMOutputWithPast(logits=ran.logits.unsqueeze(1), past_key_values=cache)
