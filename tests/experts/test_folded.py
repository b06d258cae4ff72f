"""The folded form: the same output as the weight it stands for, and the same gradient of z."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear

from pliant.experts.basis import decompose
from pliant.experts.folded import FoldedLinear, folded

SHAPES = [(24, 8), (8, 24), (16, 16)]


def parts(
    shape: tuple[int, int], rank: int, tokens: int = 5
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    out, inputs = shape
    weight = torch.randn(out, inputs, generator=generator, dtype=torch.float64)
    vectors = decompose(weight, rank).vectors
    change = 0.3 * torch.randn(rank, generator=generator, dtype=torch.float64)
    x = torch.randn(2, tokens, inputs, generator=generator, dtype=torch.float64)
    bias = torch.randn(out, generator=generator, dtype=torch.float64)
    return weight, vectors, change, x, bias


@pytest.mark.parametrize("shape", SHAPES)
def test_z_scales_the_singular_values(shape: tuple[int, int]) -> None:
    weight, vectors, change, *_ = parts(shape, min(shape))
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    scaled = u @ torch.diag(s * (1 + change)) @ vt
    assert torch.allclose(folded(weight, vectors, change), scaled, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [3, None])
@pytest.mark.parametrize("tokens", [2, 100])  # both ways to sum the products
@pytest.mark.parametrize("has_bias", [True, False])
def test_its_gradients_are_those_of_the_weight(
    shape: tuple[int, int], rank: int | None, tokens: int, has_bias: bool
) -> None:
    weight, vectors, change, x, bias = parts(shape, rank or min(shape), tokens)
    own = bias if has_bias else None
    change.requires_grad_(), x.requires_grad_()
    ours = FoldedLinear.apply(x, change, folded(weight, vectors, change), own, vectors, False)
    theirs = linear(x, folded(weight, vectors, change), own)
    assert torch.allclose(ours, theirs, atol=1e-12)
    dy = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(1)).double()
    for one, other in zip(
        torch.autograd.grad(ours, (x, change), dy),
        torch.autograd.grad(theirs, (x, change), dy),
        strict=True,
    ):
        assert torch.allclose(one.double(), other, rtol=1e-5, atol=1e-5)


def test_no_gradient_is_computed_for_what_needs_none() -> None:
    weight, vectors, change, x, bias = parts((24, 8), 8)
    made = folded(weight, vectors, change)
    x.requires_grad_()
    y = FoldedLinear.apply(x, change, made, bias, vectors, False)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.allclose(dx, made.sum(0).expand_as(dx))
    x.requires_grad_(False)
    change.requires_grad_()
    y = FoldedLinear.apply(x, change, made, bias, vectors, False)
    (gradient,) = torch.autograd.grad(y.sum(), change)
    assert gradient.shape == change.shape and gradient.any()
