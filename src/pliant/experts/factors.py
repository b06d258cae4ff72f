"""What an expert adds to a weight, as a product: left diag(d) right, with singular vectors in one.

It is the change's own singular value decomposition, up to the order: |s_i d_i| are its singular
values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pliant.errors import InvalidInput
from pliant.experts.expert import layers_of
from pliant.experts.folded import side_of_vectors


@dataclass(frozen=True, eq=False)
class Factors:
    """W = left right, if the basis has all vectors; in fp32 or better."""

    left: Tensor
    """(..., out, rank)"""
    right: Tensor
    """(..., rank, in)"""
    values: Tensor
    """(..., rank): the singular values."""


@torch.no_grad()
def factors(weight: Tensor, vectors: Tensor) -> Factors:
    """Of a weight (..., out, in) and the singular vectors of its smaller side."""
    precise = torch.promote_types(weight.dtype, torch.float32)
    weight, vectors = weight.to(precise), vectors.to(precise)
    if side_of_vectors(weight, vectors) == "input":
        left = weight @ vectors
        return Factors(left, vectors.mT, left.norm(dim=-2))
    right = vectors.mT @ weight
    return Factors(vectors, right, right.norm(dim=-1))


def factors_of(layer: Any, rank: int | None = None) -> Factors:
    """Of a layer's weight without any expert, for its first singular vectors."""
    return factors(layer.weight_alone().detach(), layer.ensure_basis().detach()[..., :rank])


def singular_values(model: nn.Module) -> dict[str, Tensor]:
    """Those of every weight that experts of the model may change, by its path."""
    values = {path: factors_of(layer).values.cpu() for path, layer in layers_of(model)}
    if not values:
        raise InvalidInput("the model has no experts: put one on it first, expert.apply(model)")
    return values
