"""The [CPX] rows: their initial values, and how their hidden states become one vector.

Shapes: B prompts, r rows, D features.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pliant.anatomy import Anatomy
from pliant.anatomy.blocks import as_projection
from pliant.complexity.config import Aggregation
from pliant.prefill import Batch, device_of, on_top

SAMPLE = 2_048
"""How many embeddings the mean and spread are estimated from."""


@torch.no_grad()
def rows_like_embeddings(anatomy: Anatomy, count: int, seed: int = 0) -> Tensor:
    """The mean embedding, and noise of the embeddings' own spread that tells the rows apart.

    Calls the embedding module instead of reading its weight: some scale what they look up. A row
    unlike every embedding (zeros, or noise of another size) would be out of distribution.
    """
    sample = anatomy.embeddings(_sample(anatomy)).float()
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, sample.shape[-1], generator=generator).to(sample.device)
    return sample.mean(dim=0) + sample.std(dim=0) * noise


def width_read(anatomy: Anatomy) -> int:
    """The width of the decoder's output, which OPT-350m, for one, narrows after its last layer.

    Where the model's own head takes another width than the hidden size, two tokens are run.
    """
    projection = None if anatomy.head is None else as_projection(anatomy.head)
    if projection is None or projection.inputs == anatomy.hidden_size:
        return anatomy.hidden_size
    ids = _sample(anatomy)[:2].unsqueeze(0)
    with torch.no_grad():
        return on_top(anatomy, Batch(ids[:, :1], torch.ones_like(ids[:, :1])), ids[:, 1:]).shape[-1]


def _sample(anatomy: Anatomy) -> Tensor:
    table = getattr(anatomy.embeddings, "num_embeddings", 2)
    size = int(getattr(anatomy.config, "vocab_size", 0) or table)
    step = max(1, size // SAMPLE)
    return torch.arange(0, size, step, device=device_of(anatomy.embeddings))


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
