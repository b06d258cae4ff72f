"""What a part costs, against what a smaller model really costs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.structure.pruning.test_prune import gpt2, llama, text

from pliant.anatomy.tiny import tiny_model
from pliant.structure import PruneConfig, export, plan_pruning, prune
from pliant.structure.pruning.costs import COSTS, Cost, cost, costs_of, latency_of, rounded, sketch
from pliant.structure.pruning.plan import levels_of


@pytest.mark.parametrize("of", ["parameters", "flops", "kv"])
def test_what_is_saved_is_what_the_smaller_model_saves(of: Cost) -> None:
    model = llama(num_hidden_layers=4, intermediate_size=64)
    costs = costs_of(model, ("heads", "channels", "layers"), of)
    shares = {"heads": 0.25, "channels": 0.5, "layers": 0.25}
    smaller = sketch(model, shares)
    expected = 1 - cost(smaller, of) / cost(model, of)
    assert costs.saved(shares) == pytest.approx(expected, rel=1e-6)
    assert costs.saved({}) == 0
    assert costs.saved({"layers": 0.25}) < costs.saved(shares)


def test_channels_are_in_no_cache() -> None:
    costs = costs_of(llama(), ("heads", "channels"), "kv")
    assert costs.saved({"channels": 0.5}) == 0
    assert costs.saved({"heads": 0.5}) == pytest.approx(0.5)


def test_operations_are_those_of_every_matrix_product() -> None:
    model = tiny_model("mixtral")
    config, tokens = model.config, 128
    experts = 2 * tokens * config.num_experts_per_tok * 3
    experts *= config.hidden_size * config.intermediate_size * config.num_hidden_layers
    head = 2 * tokens * config.hidden_size * config.vocab_size
    assert cost(model, "flops") > experts + head
    assert model.config._experts_implementation != "eager"  # as it was


def test_a_part_without_a_smaller_form_is_named() -> None:
    costs = costs_of(gpt2(), ("heads", "channels", "experts"))
    assert list(costs.parts) == ["channels"]
    assert "no stock form" in costs.why_not["heads"]
    assert "no mixture" in costs.why_not["experts"]


def test_latency_is_measured() -> None:
    model = llama()
    assert 0 < latency_of(model, {"layers": 0.34}) < 100
    assert set(COSTS) == {"parameters", "flops", "kv", "latency"}


def test_a_sketch_is_a_model_that_runs() -> None:
    smaller = sketch(llama(), {"heads": 0.5, "channels": 0.5, "layers": 0.34})
    assert smaller.config.num_hidden_layers == 2
    assert smaller(input_ids=torch.ones(1, 3, dtype=torch.long)).logits.shape == (1, 3, 64)


def test_a_plan_saves_what_the_exported_model_does(tmp_path: Path) -> None:
    """Units are whole, and of many channels a multiple of eight stays."""
    model = llama(num_hidden_layers=5, intermediate_size=90)
    config = PruneConfig(channels=0.2, heads=0.3, layers=0.25, score="magnitude", compensate=False)
    plan = plan_pruning(model, text(), text(1), config, controls=False)
    prune(model, text(), config)
    result = export(model, tmp_path / "smaller")
    saved = 1 - result.parameters / result.parameters_before
    assert plan.best.saved == pytest.approx(saved, rel=1e-9)


def test_layers_of_different_sizes_save_what_they_hold(tmp_path: Path) -> None:
    """The first layer of a DeepSeek has an MLP, and the others have mixtures."""
    model = tiny_model("deepseek_v3")
    shares = {"heads": 0.5, "experts": 0.5, "layers": 0.25}
    config = PruneConfig(**shares, score="magnitude", compensate=False)  # type: ignore[arg-type]
    plan = plan_pruning(model, text(), text(1), config, controls=False)
    prune(model, text(), config)
    result = export(model, tmp_path / "smaller")
    saved = 1 - result.parameters / result.parameters_before
    assert plan.best.saved == pytest.approx(saved, rel=1e-9)


def test_levels_are_shares_that_really_go() -> None:
    model = llama(intermediate_size=200)
    for share in levels_of(model, "channels").tolist():
        assert rounded(model, {"channels": share}) == {"channels": pytest.approx(share)}
