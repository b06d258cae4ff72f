"""The [CPX] rows: what they start as, and how their hidden states become the outputs' logits.

Shapes: B prompts, r rows, D features, O outputs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pliant.anatomy import Anatomy
from pliant.anatomy.projection import as_projection
from pliant.complexity.config import Aggregation
from pliant.prefill import Batch, device_of, on_top

SAMPLE = 2_048
"""Embeddings that are looked at; their mean and spread are known well enough from so many."""


@torch.no_grad()
def rows_like_embeddings(anatomy: Anatomy, count: int, seed: int = 0) -> Tensor:
    """The mean embedding, and noise of the embeddings' own spread that tells the rows apart.

    The embedding module is asked and not its weight: some scale what they look up. A row far from
    where embeddings lie (zeros, or noise of another size) would be a token as the layers never saw
    one.
    """
    known = anatomy.embeddings(_sample(anatomy)).float()
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, known.shape[-1], generator=generator).to(known.device)
    return known.mean(dim=0) + known.std(dim=0) * noise


def width_read(anatomy: Anatomy) -> int:
    """The width of what the decoder gives: OPT-350m, for one, narrows it after its last layer.

    What the model's own head takes tells it; where that is not the hidden size, it is tried out.
    """
    projection = None if anatomy.head is None else as_projection(anatomy.head)
    if projection is None or projection.inputs == anatomy.hidden_size:
        return anatomy.hidden_size
    ids = _sample(anatomy)[:2].unsqueeze(0)
    with torch.no_grad():
        return on_top(anatomy, Batch(ids[:, :1], torch.ones_like(ids[:, :1])), ids[:, 1:]).shape[-1]


def _sample(anatomy: Anatomy) -> Tensor:
    size = int(getattr(anatomy.config, "vocab_size", 0) or _table(anatomy.embeddings))
    step = max(1, size // SAMPLE)
    return torch.arange(0, size, step, device=device_of(anatomy.embeddings))


def _table(embeddings: nn.Module) -> int:
    return int(getattr(embeddings, "num_embeddings", 2))


# --- reading -------------------------------------------------------------------------------------


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
