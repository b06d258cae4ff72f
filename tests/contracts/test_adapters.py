"""On every architecture: neutral is invisible, detach restores, a save is all of an adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.minimal_adapter import (
    Scale,
    ScaleConfig,
    anatomy_of,
    logits,
    same_anatomy,
    trained,
)
from transformers import PreTrainedModel

from pliant.adapters import attach, fingerprint
from pliant.anatomy.tiny import tiny_model

TYPES = [
    "llama",
    "gpt2",
    "mistral",
    "qwen3",
    "gemma3_text",
    "phi3",
    "gpt_neox",
    "opt",
    "bloom",
    "falcon",
    "mixtral",
    "mamba",
]


@pytest.fixture(params=TYPES)
def type_(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def model(type_: str, request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny_model(type_, dtype=request.param)


def test_neutral_changes_no_bit(model: PreTrainedModel) -> None:
    base = logits(model)
    attach(model, Scale(model, ScaleConfig()))
    assert torch.equal(logits(model).view(torch.uint8), base.view(torch.uint8))


def test_disabled_is_the_base_and_detach_restores_it(model: PreTrainedModel) -> None:
    before, base, print_ = anatomy_of(model), logits(model), fingerprint(model)
    adapter = trained(attach(model, Scale(model, ScaleConfig())))
    assert not torch.equal(logits(model), base)
    with adapter.disabled():
        assert torch.equal(logits(model), base)
    assert fingerprint(model) == print_
    adapter.detach()
    assert torch.equal(logits(model), base)
    assert same_anatomy(anatomy_of(model), before)


def test_saved_and_loaded_agree(model: PreTrainedModel, tmp_path: Path) -> None:
    adapter = trained(attach(model, Scale(model, ScaleConfig())))
    expected = logits(model)
    adapter.save_pretrained(tmp_path)
    adapter.detach()
    Scale.from_pretrained(model, tmp_path)
    assert torch.equal(logits(model), expected)


def test_an_adapter_of_the_fp32_base_loads_on_its_bf16_copy(type_: str, tmp_path: Path) -> None:
    model = tiny_model(type_)
    adapter = trained(attach(model, Scale(model, ScaleConfig())))
    adapter.save_pretrained(tmp_path)
    adapter.detach()
    again = Scale.from_pretrained(model.bfloat16(), tmp_path)
    assert torch.equal(again.embeddings, adapter.embeddings)
