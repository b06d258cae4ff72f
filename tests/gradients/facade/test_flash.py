"""The best attention there is, and which: on a machine without a GPU sdpa, and eager where not."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from pliant.anatomy.tiny import tiny_model
from pliant.errors import InvalidInput, UnsupportedModel
from pliant.gradients.facade.flash import (
    AttentionWarning,
    enable_flash_attention,
    load_model_with_flash_attention,
)

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
IDS = torch.tensor([[5, 6, 7, 8]])


@no_gpu
@pytest.mark.parametrize("before", ["eager", "sdpa"])
def test_the_best_there_is(before: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model("llama")
    model.set_attn_implementation(before)
    logits = model(IDS).logits
    assert enable_flash_attention(model) is model
    assert model.config._attn_implementation == "sdpa"
    said = capsys.readouterr().out
    assert said.startswith("LlamaForCausalLM: sdpa attention; no flash_attention_2: ")
    torch.testing.assert_close(model(IDS).logits, logits)


def test_what_was_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for backend in ("eager", "sdpa"):
            enable_flash_attention(model, backend=backend, verbose=False)  # type: ignore[arg-type]
            assert model.config._attn_implementation == backend
    assert capsys.readouterr().out == ""


@no_gpu
def test_what_is_not_to_be_had_gives_way_and_says_so() -> None:
    model = tiny_model("llama")
    with pytest.warns(AttentionWarning, match="has sdpa attention, not flash_attention_2: ") as w:
        enable_flash_attention(model, backend="flash_attention_2", verbose=False)
    assert w[0].filename == __file__
    assert model.config._attn_implementation == "sdpa"


@no_gpu
def test_a_model_that_has_no_sdpa(capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model("bloom")
    enable_flash_attention(model)
    assert model.config._attn_implementation == "eager"
    assert "BloomForCausalLM: eager attention; no flash_attention_2: " in capsys.readouterr().out


@no_gpu
def test_a_model_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    model = load_model_with_flash_attention("nano-s")
    assert model.config._attn_implementation == "sdpa" and not model.training
    assert model.dtype == torch.float32, "the checkpoint's own"
    assert "sdpa attention" in capsys.readouterr().out
    halved = load_model_with_flash_attention(
        "nano-s", backend="eager", torch_dtype=torch.bfloat16, device_map=None
    )
    assert halved.config._attn_implementation == "eager" and halved.dtype == torch.bfloat16


def test_bad_input_is_named() -> None:
    with pytest.raises(InvalidInput, match="backend = 'fastest'"):
        enable_flash_attention(tiny_model("llama"), backend="fastest")  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModel, match="Linear has no choice of attention"):
        enable_flash_attention(nn.Linear(2, 2))  # type: ignore[arg-type]
