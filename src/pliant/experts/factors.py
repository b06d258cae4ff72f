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

    @property
    def left_is_orthonormal(self) -> bool:
        """Whether the singular vectors are in `left`; otherwise they are in `right`."""
        return self.left.shape[-2] < self.right.shape[-1]

    @property
    def divisors(self) -> Tensor:
        """The singular values, above 0, by which the other factor is divided."""
        return self.values.clamp_min(torch.finfo(self.values.dtype).tiny)


@torch.no_grad()
def factors(weight: Tensor, vectors: Tensor) -> Factors:
    """The factors of a weight (..., out, in), from the singular vectors of its smaller side."""
    precise = torch.promote_types(weight.dtype, torch.float32)
    weight, vectors = weight.to(precise), vectors.to(precise)
    if side_of_vectors(weight, vectors) == "input":
        left = weight @ vectors
        return Factors(left, vectors.mT, left.norm(dim=-2))
    right = vectors.mT @ weight
    return Factors(vectors, right, right.norm(dim=-1))


def factors_of(layer: Any, rank: int | None = None) -> Factors:
    """The factors of a layer's weight without any expert, for its first `rank` vectors."""
    return factors(layer.weight_alone().detach(), layer.ensure_basis().detach()[..., :rank])


def singular_values(model: nn.Module) -> dict[str, Tensor]:
    """The singular values of every weight that an expert of the model may change, by its path."""
    values = {path: factors_of(layer).values.cpu() for path, layer in layers_of(model)}
    if not values:
        raise InvalidInput("the model has no experts: put one on it first, expert.apply(model)")
    return values
