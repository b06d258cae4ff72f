"""Closed recurrent heads are removed where a stock model can lack them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.minimal_adapter import logits
from transformers import AutoModelForCausalLM

from pliant.anatomy.tiny import tiny_model
from pliant.errors import UnsupportedModel
from pliant.structure import GateConfig, attach, export, export_from_disk
from pliant.structure.gates import Gates
from pliant.structure.units import units_of


def close(model: Any, share: float = 0.5, first: int = 0) -> Gates:
    """Close a share of the heads, by the keys that they share, others in each layer; `first` more
    of the first layer."""
    gates = attach(model, GateConfig(("recurrent_heads",)))
    with torch.no_grad():
        for n, site in enumerate(gates.sites):
            units, generator = units_of(site), torch.Generator().manual_seed(n)
            gate = gates[site.kind, site.layer, site.block].view(units, -1)
            count = round(share * units) + (first if n == 0 else 0)
            gate[torch.randperm(units, generator=generator)[:count]] = 0
    return gates


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("mamba2", "num_heads"),  # in two groups that share B and C
        ("falcon_h1", "mamba_n_heads"),  # all of which share B and C
        ("nemotron_h", "mamba_num_heads"),
        ("zamba", "n_mamba_heads"),
        ("qwen3_next", "linear_num_value_heads"),  # two of which share a key, in one matrix
        ("qwen3_5_text", "linear_num_value_heads"),
        ("olmo_hybrid", "linear_num_value_heads"),
        ("kimi_linear", "linear_num_heads"),
        ("rwkv", "attention_hidden_size"),
        ("xlstm", "num_heads"),
    ],
)
def test_half_of_the_heads_are_gone(name: str, number: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    closed = sum(int((gate == 0).sum()) for gate in close(model).parameters())
    live = logits(model)
    result = export(model, tmp_path / "smaller")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "smaller").eval()
    assert getattr(again.config, number) == getattr(model.config, number) / 2
    assert float((logits(again) - live).abs().max() / live.abs().max()) <= 1e-5
    assert result.removed == {"recurrent_heads": closed} and not result.zeroed


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("mamba", "no number of its config"),  # a channel's state feeds all others' time steps
        ("minimax", "no number of its config"),  # as many heads as its softmax attention
        ("bamba", "a norm spans several of them"),
    ],
)
def test_heads_that_no_stock_form_lacks(name: str, why: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    close(model)
    live = logits(model)
    with pytest.raises(UnsupportedModel, match=f"{why}.*With zeros=True they stay"):
        export(model, tmp_path / "smaller")
    result = export(model, tmp_path / "smaller", zeros=True)
    assert not result.removed and result.zeroed["recurrent_heads"] > 0
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "smaller").eval()
    assert torch.allclose(logits(again), live, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "groups", "why"),
    [
        ("mamba2", "n_groups", "expand is a whole number, 2, and would be 1.5"),
        ("zamba", "n_mamba_heads", "mamba_expand is a whole number, 2, and would be 1.5"),
        ("nemotron_h", "n_groups", None),
    ],
)
def test_a_quarter_goes_where_the_width_may_be_a_fraction_of_the_hidden_size(
    name: str, groups: str, why: str | None, tmp_path: Path
) -> None:
    config = tiny_model(name).config
    setattr(config, groups, 4)
    model = AutoModelForCausalLM.from_config(config).eval()
    close(model, 0.25)
    if why is None:
        assert export(model, tmp_path / "smaller").removed == {"recurrent_heads": 2}
        return
    with pytest.raises(UnsupportedModel, match=f"{why}.*With zeros=True they stay"):
        export(model, tmp_path / "smaller")


def test_as_many_go_from_each_layer_and_the_others_are_zero(tmp_path: Path) -> None:
    model = tiny_model("kimi_linear")
    close(model, first=1)
    with pytest.raises(UnsupportedModel, match="layers lose different shares"):
        export(model, tmp_path / "smaller")
    result = export(model, tmp_path / "smaller", zeros=True)
    assert result.removed == {"recurrent_heads": 6} and result.zeroed == {"recurrent_heads": 1}


def test_from_disk_it_is_the_same(tmp_path: Path) -> None:
    model = tiny_model("mamba2")
    model.save_pretrained(tmp_path / "base")
    gates = close(model)
    gates.save_pretrained(tmp_path / "gates")
    live = logits(model)
    result = export_from_disk(tmp_path / "base", [tmp_path / "gates"], tmp_path / "smaller")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "smaller").eval()
    assert result.removed == {"recurrent_heads": 16} and again.config.n_groups == 1
    assert float((logits(again) - live).abs().max() / live.abs().max()) <= 1e-5
