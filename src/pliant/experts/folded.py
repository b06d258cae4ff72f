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
"""Of 1 + d_i: the gradient divides by it, so a layer that has one below uses the delta form."""


def folded(weight_OI: Tensor, vectors: Tensor, change: Tensor) -> Tensor:
    """The weight with the expert in it; (..., out, in), computed in fp32 or better.

    Differentiable in the change, through a gradient as large as the weight: so this is for code
    that uses a weight without calling its projection, and for a mixture's stacked weights.
    """
    precise = torch.promote_types(weight_OI.dtype, torch.float32)
    own, basis, scale = weight_OI.to(precise), vectors.to(precise), change[..., None, :]
    by_input = side_of_vectors(weight_OI, vectors) == "input"
    if not by_input:
        own = own.mT
    larger, (side, rank) = own.shape[-2], basis.shape[-2:]
    if side * (rank + larger) < 2 * larger * rank:  # the cheaper order of the products
        update = own @ ((basis * scale) @ basis.mT)
    else:
        update = ((own @ basis) * scale) @ basis.mT
    made = (own + update).to(weight_OI.dtype)
    return made if by_input else made.mT


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
        seen = x if ctx.side == "input" else y
        ctx.save_for_backward(seen, change, folded_OI, bias, vectors)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        seen, change, folded_OI, bias, vectors = ctx.saved_tensors
        wants_x, wants_change = ctx.needs_input_grad[:2]
        basis, by_input = vectors.to(dy.dtype), ctx.side == "input"
        dx = gradient = None
        if wants_x or (wants_change and by_input):
            dx = dy @ folded_OI.to(dy.dtype)
        if wants_change:
            if by_input:
                gradient = _products(seen.to(dy.dtype), dx, basis)
            else:
                inner = seen if bias is None else seen - bias
                gradient = _products(inner.to(dy.dtype), dy, basis)
            gradient = gradient / (1 + change)
        return dx if wants_x else None, gradient, None, None, None, None


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
