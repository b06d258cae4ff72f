"""Closed channels of experts are removed where the stock config has a number for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.minimal_adapter import logits
from transformers import AutoModelForCausalLM

from pliant.anatomy.tiny import tiny_model
from pliant.structure import ExportResult, GateConfig, attach, export
from pliant.structure.pruning.remaining_experts import attach as close


def close_channels(model: Any, experts: int, uneven: int = 0) -> int:
    """Close a quarter of the channels of every expert, others in each; returns how many."""
    gates = attach(model, GateConfig(("expert_channels",)))
    total = 0
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for site in gates.sites:
            gate = gates[site.kind, site.layer, site.block].view(experts, -1)
            for row in gate:
                row[torch.randperm(len(row), generator=generator)[: len(row) // 4]] = 0
            row[(row != 0).nonzero().flatten()[:uneven]] = 0
            total += int((gate == 0).sum())
    return total


def exported(model: Any, folder: Path) -> tuple[ExportResult, Any]:
    result = export(model, folder)
    again = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert torch.allclose(logits(again), logits(model), atol=1e-5)
    return result, again


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("mixtral", "intermediate_size"),
        ("qwen3_moe", "moe_intermediate_size"),
        ("gpt_oss", "intermediate_size"),  # gate and up lie in turn, with biases
    ],
)
def test_each_expert_loses_channels_of_its_own(name: str, number: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    experts = model.config.num_local_experts if name != "qwen3_moe" else model.config.num_experts
    total = close_channels(model, experts)
    result, again = exported(model, tmp_path / "smaller")
    assert getattr(again.config, number) == getattr(model.config, number) * 3 // 4
    assert result.removed == {"expert_channels": total} and not result.zeroed
    assert result.parameters < result.parameters_before


def test_what_one_expert_loses_beyond_the_others_is_zero(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    total = close_channels(model, model.config.num_local_experts, uneven=2)
    result, again = exported(model, tmp_path / "smaller")
    sites = model.config.num_hidden_layers
    assert result.removed["expert_channels"] == total - 2 * sites
    assert result.zeroed == {"expert_channels": 2 * sites}
    assert again.config.intermediate_size == model.config.intermediate_size * 3 // 4


def test_experts_and_channels_of_the_others_go_together(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    count, depth = model.config.num_local_experts, model.config.num_hidden_layers
    close_channels(model, count)
    close(model, {str(i): (i % count,) for i in range(depth)})
    result, again = exported(model, tmp_path / "smaller")
    assert again.config.num_local_experts == count - 1
    assert again.config.intermediate_size == model.config.intermediate_size * 3 // 4
    assert result.removed["experts"] == depth


def test_channels_that_no_stock_form_lacks_are_zero(tmp_path: Path) -> None:
    model = tiny_model("dbrx")  # whose experts are joined in one matrix
    total = close_channels(model, model.config.ffn_config.moe_num_experts)
    result, _ = exported(model, tmp_path / "smaller")
    assert result.removed == {} and result.zeroed == {"expert_channels": total}
