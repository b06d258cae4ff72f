"""The entropy of attention, read by hooks, is that of the weights that the model returns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.structure.models import ARCHITECTURES, IDS, model
from torch import Tensor

from pliant.anatomy import Anatomy
from pliant.errors import InvalidInput, UnsupportedModel
from pliant.structure import sites_of
from pliant.structure.entropy import attention_entropy


def entropies(model: Any, **batch: Tensor) -> dict[str, Tensor]:
    anatomy = Anatomy.of(model)
    return attention_entropy(anatomy, sites_of(anatomy, ["heads"]), batch)


def expected(weights: Tensor) -> Tensor:
    """H / log T over all queries of a batch without padding."""
    entropy = -(weights * weights.clamp(min=1e-30).log()).sum(-1)
    return entropy.mean((0, 2)) / torch.tensor(float(weights.shape[-1])).log()


@pytest.mark.parametrize("name", [*ARCHITECTURES, "jamba", "bert"])
def test_it_is_that_of_the_weights_that_the_model_returns(name: str) -> None:
    eager = model(name)
    seen = entropies(eager, input_ids=IDS)
    assert eager.config._attn_implementation == model(name).config._attn_implementation
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        weights = eager(input_ids=IDS, use_cache=False, output_attentions=True).attentions
    weights = [w for w in weights if w is not None]
    assert len(seen) == len(weights)
    for own, layer in zip(seen.values(), weights, strict=True):
        assert torch.allclose(own, expected(layer), atol=1e-5)


def test_even_attention_has_the_entropy_of_its_causal_mask() -> None:
    llama = model()
    with torch.no_grad():
        for name, parameter in llama.named_parameters():
            if "q_proj" in name:
                parameter.zero_()
    even = torch.arange(1, 13).float().log().mean() / torch.tensor(12.0).log()
    for layer in entropies(llama, input_ids=IDS).values():
        assert torch.allclose(layer, even.expand(4), atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_counts_for_nothing(side: str) -> None:
    pads = torch.full((2, 5), 4)
    order = [pads, IDS] if side == "left" else [IDS, pads]
    mask = torch.cat([torch.full_like(x, int(x is IDS)) for x in order], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    padded = entropies(
        model(), input_ids=torch.cat(order, 1), attention_mask=mask, position_ids=positions
    )
    for key, alone in entropies(model(), input_ids=IDS).items():
        assert torch.allclose(padded[key], alone, atol=1e-5)


def test_a_model_that_returns_no_weights_is_refused_and_keeps_no_hook() -> None:
    cpmant = model("cpmant")
    with pytest.raises(UnsupportedModel, match="returns no attention weights in layer 0"):
        entropies(cpmant, input_ids=IDS)
    assert not any(module._forward_hooks for module in cpmant.modules())


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({}, "no input_ids"),
        ({"input_ids": IDS[0]}, "no input_ids of shape"),
        ({"input_ids": IDS[:, :1]}, "fewer than 2 tokens"),
        ({"input_ids": IDS, "attention_mask": torch.ones(2, 11)}, "attention_mask has shape"),
    ],
)
def test_a_batch_without_entropy_is_refused(batch: dict[str, Tensor], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        entropies(model(), **batch)
