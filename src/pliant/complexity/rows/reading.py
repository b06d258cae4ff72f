"""From the rows' hidden states to one vector, and to the outputs; always in fp32.

Shapes: B prompts, r rows, D features, O outputs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pliant.complexity.config import Aggregation


def pooled(hidden_BrD: Tensor, how: Aggregation, query_D: Tensor | None = None) -> Tensor:
    """One vector for each prompt, (B, D)."""
    if how == "mean":
        return hidden_BrD.mean(dim=1)
    if how == "max":
        return hidden_BrD.amax(dim=1)
    if how == "attention":
        assert query_D is not None
        weights_Br = (hidden_BrD @ query_D / math.sqrt(len(query_D))).softmax(dim=1)
        return (weights_Br.unsqueeze(-1) * hidden_BrD).sum(dim=1)
    return hidden_BrD[:, -1]


def read(
    hidden_BrD: Tensor, head: nn.Linear, how: Aggregation, query_D: Tensor | None = None
) -> Tensor:
    """The outputs' logits, (B, O), on the head's device."""
    h = hidden_BrD.to(device=head.weight.device, dtype=head.weight.dtype)
    with torch.autocast(device_type=h.device.type, enabled=False):
        return F.linear(pooled(h, how, query_D), head.weight, head.bias)
