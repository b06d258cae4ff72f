"""Rows with experts of their own in mixtures of experts, whose stacked weights all tokens share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.experts.models import IDS, logits, with_experts

from pliant.anatomy.tiny import tiny_model
from pliant.errors import InvalidInput
from pliant.experts import Rows

MIXTURES = ("mixtral", "qwen3_moe", "gpt_oss", "llama4_text")


def tiny(name: str) -> Any:
    torch.manual_seed(0)
    return tiny_model(name).eval()


@pytest.mark.parametrize("name", MIXTURES)
def test_each_row_is_as_alone(name: str) -> None:
    model = with_experts("math", "code", model=tiny(name))
    mixtures: list[dict[str, float]] = [{"math": 1.0}, {}, {"math": 0.5, "code": -1.0}]
    with model.base_model.rows(mixtures):
        rows = logits(model)
    with model.disable_adapter():
        assert torch.allclose(rows[1], logits(model)[1], atol=1e-5)
    model.set_adapter("math")
    assert torch.allclose(rows[0], logits(model)[0], atol=1e-5)
    model.add_weighted_adapter(["math", "code"], [0.5, -1.0], "mixed")
    model.set_adapter("mixed")
    assert torch.allclose(rows[2], logits(model)[2], atol=1e-5)
    assert not torch.allclose(rows[2], rows[1], atol=1e-3)


@pytest.mark.parametrize("form", ["delta", "folded"])
def test_generation_with_padding_is_as_alone(form: Any) -> None:
    model = with_experts("math", "code", model=tiny("mixtral"), form=form).requires_grad_(False)
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    mixtures: list[dict[str, float]] = [{"code": 1.0}, {"math": 1.0}, {"code": 1.0}]
    with model.base_model.rows(mixtures):
        together = model.generate(input_ids=IDS, attention_mask=mask, **settings)
    for row, mixture in enumerate(mixtures):
        with model.base_model.rows([mixture]):
            ids = IDS[row : row + 1, 4 if row == 0 else 0 :]
            alone = model.generate(input_ids=ids, **settings)
        assert torch.equal(together[row, -5:], alone[0, -5:])


def test_a_coefficient_has_a_gradient() -> None:
    model = with_experts("math", model=tiny("mixtral"), parts="mlp").requires_grad_(False)
    weights = torch.ones(1, 1, requires_grad=True)
    with model.base_model.rows(Rows(("math",), weights)):
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    assert weights.grad is not None and weights.grad.any()


def test_merged_experts_are_unmerged_first() -> None:
    model = with_experts("math", model=tiny("mixtral"), parts="mlp")
    model.merge_adapter()
    with model.base_model.rows([{"math": 1.0}, {}, {}]), pytest.raises(InvalidInput, match="unmer"):
        logits(model)
