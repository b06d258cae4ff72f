"""The folded form: one ordinary projection with the expert in its weight, and a gradient for z.

The gradient of d = z - 1 needs no gradient of the weight. With W' = W (I + V diag(d) V^T) and the
gradient dx = W'^T dy, which the layer computes anyway,

    dd_i = sum over tokens of (v_i . x) (v_i . dx) / (1 + d_i)

and likewise with u_i, the output without its bias and dy, where the smaller side is the output.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from pliant.experts.basis import Side

NEAR_ZERO = 1e-2
"""The gradient divides by 1 + d_i: a layer with a smaller |1 + d_i| uses the delta form."""


def folded(weight_OI: Tensor, vectors: Tensor, change: Tensor) -> Tensor:
    """The weight (..., out, in) with the expert in it, computed in fp32 or better.

    It is differentiable in the change, but through a gradient as large as the weight. So this is
    for code that uses a weight without calling its projection, and for stacked weights.
    """
    precise = torch.promote_types(weight_OI.dtype, torch.float32)
    weight, basis, scale = weight_OI.to(precise), vectors.to(precise), change[..., None, :]
    by_input = side_of_vectors(weight_OI, vectors) == "input"
    if not by_input:
        weight = weight.mT
    larger, (side, rank) = weight.shape[-2], basis.shape[-2:]
    if side * (rank + larger) < 2 * larger * rank:  # the cheaper order of the products
        update = weight @ ((basis * scale) @ basis.mT)
    else:
        update = ((weight @ basis) * scale) @ basis.mT
    result = (weight + update).to(weight_OI.dtype)
    return result if by_input else result.mT


def side_of_vectors(weight_OI: Tensor, vectors: Tensor) -> Side:
    """The smaller side; the input's if both are equal."""
    return "input" if vectors.shape[-2] == weight_OI.shape[-1] else "output"


class FoldedLinear(torch.autograd.Function):
    """x W'^T + b, differentiable in x and in d; no 1 + d_i may be near zero."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        change: Tensor,
        folded_OI: Tensor,
        bias: Tensor | None,
        vectors: Tensor,
        is_conv1d: bool,
    ) -> Tensor:
        y = _conv1d(x, folded_OI, bias) if is_conv1d else linear(x, folded_OI, bias)
        ctx.side = side_of_vectors(folded_OI, vectors)
        activation = x if ctx.side == "input" else y
        ctx.save_for_backward(activation, change, folded_OI, bias, vectors)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        activation, change, folded_OI, bias, vectors = ctx.saved_tensors
        needs_dx, needs_change = ctx.needs_input_grad[:2]
        basis, by_input = vectors.to(dy.dtype), ctx.side == "input"
        dx = gradient = None
        if needs_dx or (needs_change and by_input):
            dx = dy @ folded_OI.to(dy.dtype)
        if needs_change:
            if by_input:
                gradient = _products(activation.to(dy.dtype), dx, basis)
            else:
                unbiased = activation if bias is None else activation - bias
                gradient = _products(unbiased.to(dy.dtype), dy, basis)
            gradient = gradient / (1 + change)
        return dx if needs_dx else None, gradient, None, None, None, None


def _products(a: Tensor, b: Tensor | None, vectors: Tensor) -> Tensor:
    """sum over tokens of (v_i . a) (v_i . b), in fp32.

    Either both are projected on the vectors, or, with many tokens, their product a^T b is.
    """
    assert b is not None
    a, b = a.flatten(0, -2), b.flatten(0, -2)
    tokens, (side, rank) = a.shape[0], vectors.shape
    if 2 * tokens * rank > side * (tokens + rank):
        return ((a.T @ b) @ vectors).mul(vectors).sum(0, dtype=torch.float32)
    return (a @ vectors).mul(b @ vectors).sum(0, dtype=torch.float32)


def _conv1d(x: Tensor, folded_OI: Tensor, bias: Tensor | None) -> Tensor:
    """As transformers' Conv1D computes it, so that z = 1 changes no bit."""
    assert bias is not None
    y = torch.addmm(bias, x.reshape(-1, x.shape[-1]), folded_OI.mT)
    return y.view(*x.shape[:-1], folded_OI.shape[0])
