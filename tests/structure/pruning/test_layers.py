"""The layer before one that goes takes over what it can, and never makes things worse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pliant import load, nano
from pliant.anatomy.lockstep import LayerCall
from pliant.structure import PruneConfig, calibration_batches, perplexity, prune
from pliant.structure.calibration import Sample
from pliant.structure.pruning.layers import Predecessor

B, T, INPUTS, OUTPUTS = 2, 40, 6, 5


def predecessor(weight: Tensor, layer: Callable[..., Any], seed: int = 0) -> Predecessor:
    """A layer that is its projection and `layer`, on random features."""
    torch.manual_seed(seed)
    features = [torch.randn(B, T, INPUTS) for _ in range(2)]
    calls = [LayerCall(lambda x: layer(x @ weight.T), (x,), {}) for x in features]
    ones = torch.ones(B, T, dtype=torch.bool)
    samples = [Sample({}, torch.zeros(B, T, dtype=torch.long), ones) for _ in features]
    return Predecessor(weight, calls, features, samples)


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x, "cache")], ids=["tensor", "tuple"])
def test_an_update_that_is_linear_in_the_features_is_taken_over(wrap: Callable[..., Any]) -> None:
    weight = torch.randn(OUTPUTS, INPUTS)
    own = predecessor(weight, wrap)
    before, change = weight.clone(), torch.randn(OUTPUTS, INPUTS)
    wanted = [x @ (before + change).T for x in own.features]
    after = own.take_over(wanted, damping=1e-8)
    assert torch.allclose(weight, before + change, atol=1e-4)
    assert all(torch.allclose(a, w, atol=1e-4) for a, w in zip(after, wanted, strict=True))


def test_a_change_that_does_not_help_is_taken_back() -> None:
    """As where a norm follows the projection: its outputs do not follow its weights."""
    weight = torch.randn(OUTPUTS, INPUTS)
    own = predecessor(weight, torch.sign)
    before = weight.clone()
    wanted = [torch.sign(x @ before.T) + 1e-3 * x[..., :OUTPUTS] for x in own.features]
    after = own.take_over(wanted, damping=1e-8)
    assert torch.equal(weight, before)
    assert all(
        torch.equal(a, torch.sign(x @ before.T)) for a, x in zip(after, own.features, strict=True)
    )


def test_an_error_counts_relative_to_the_state_of_its_token() -> None:
    """Some models give the first token a state a thousand times as long as the others'."""
    weight = torch.randn(OUTPUTS, INPUTS)
    own = predecessor(weight, lambda x: x)
    before, change = weight.clone(), torch.randn(OUTPUTS, INPUTS)
    wanted = [x @ (before + change).T for x in own.features]
    for aim in wanted:
        aim[:, 0] = 1000 * torch.randn(B, OUTPUTS)  # nothing linear
    own.take_over(wanted, damping=1e-6)
    assert float((weight - before - change).norm() / change.norm()) < 0.5


def test_padding_does_not_count() -> None:
    weights = []
    for noise in (0.0, 100.0):
        weight = torch.ones(OUTPUTS, INPUTS)
        own = predecessor(weight, lambda x: x)
        for sample in own.samples:
            sample.mask_BT[:, :10] = False
        wanted = [x @ torch.full((OUTPUTS, INPUTS), 2.0).T for x in own.features]
        for aim in wanted:
            aim[:, :10] += noise
        own.take_over(wanted, damping=1e-8)
        weights.append(weight)
    assert torch.equal(*weights)


def test_a_real_model_loses_less_when_the_layer_before_takes_over() -> None:
    model, tokenizer = load("nano-l")
    rows = nano.conversations("train", 400)
    batches = calibration_batches(rows, tokenizer, tokens=3000, length=96)
    lost = {}
    for compensate in (True, False):
        config = PruneConfig(layers=0.25, compensate=compensate)
        pruned = prune(model, batches[1:], config)
        lost[compensate] = perplexity(model, batches[:1])
        pruned.detach()
    assert lost[True] < 0.7 * lost[False]
