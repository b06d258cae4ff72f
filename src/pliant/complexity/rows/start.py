"""How a scorer starts: rows like the model's own embeddings, a head that knows nothing yet."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pliant.anatomy import Anatomy
from pliant.anatomy.projection import as_projection
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
