"""Layers may lose different numbers of units: those go whose loss costs least."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.minimal_adapter import anatomy_of, logits, same_anatomy
from tests.structure.pruning.test_prune import gpt2, likely_text, llama, relative_error, text
from transformers import AutoModelForCausalLM

from pliant.adapters import attached
from pliant.anatomy.tiny import tiny_config, tiny_model
from pliant.errors import UnsupportedModel
from pliant.structure import (
    GateConfig,
    PlanConfig,
    PruneConfig,
    Pruned,
    attach,
    export,
    export_from_disk,
    plan_pruning,
    prune,
)
from pliant.structure.gates import Gates


def spare(model: Any, layer: int) -> Any:
    """A model in one layer of which half of the channels and of the heads do next to nothing."""
    with torch.no_grad():
        model.model.layers[layer].mlp.down_proj.weight[:, ::2] *= 1e-4
        model.model.layers[layer].self_attn.o_proj.weight[:, :32] *= 1e-4
    return model


def closed(gates: Gates, kind: Any, depth: int = 3) -> list[int]:
    return [int((gates[kind, layer] == 0).sum()) for layer in range(depth)]


@pytest.mark.parametrize("score", ["error", "activation", "fisher", "magnitude"])
@pytest.mark.parametrize(("part", "total", "share"), [("channels", 24, 1 / 6), ("heads", 6, 0.25)])
def test_the_layer_that_can_spare_units_loses_most(
    score: Any, part: Any, total: int, share: float
) -> None:
    model = spare(llama(), 1)
    base, before = logits(model), anatomy_of(model)
    own = likely_text(model)
    uniform = prune(model, own, PruneConfig(**{part: share}, score=score))
    loses = relative_error(model, base)
    uniform.detach()
    pruned = prune(model, own, PruneConfig(**{part: share}, score=score, uniform=False))
    counts = closed(pruned.gates, part)
    assert sum(counts) == total and counts[1] > total / 2
    assert relative_error(model, base) < loses
    pruned.detach()
    assert torch.equal(logits(model), base)
    assert same_anatomy(anatomy_of(model), before)


def test_a_layer_whose_output_matters_less_to_the_loss_loses_more() -> None:
    """The same error of the same projection costs nothing where later layers do not see it."""
    model = llama()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.load_state_dict(model.model.layers[0].mlp.state_dict())
        model.model.layers[2].post_attention_layernorm.weight.mul_(1e-3)
    pruned = prune(model, likely_text(model), PruneConfig(channels=0.25, uniform=False))
    counts = closed(pruned.gates, "channels")
    assert sum(counts) == 36 and counts[2] == max(counts) > 12


def test_no_layer_is_emptied() -> None:
    model = llama()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.zero_()
    pruned = prune(model, text(), PruneConfig(channels=0.25, uniform=False))
    assert closed(pruned.gates, "channels")[0] == 34  # 12, and 6 tenths of the other 36


def test_of_many_channels_a_multiple_of_eight_stays_in_every_layer() -> None:
    model = spare(llama(intermediate_size=164), 1)
    pruned = prune(model, text(), PruneConfig(channels=0.3, uniform=False))
    counts = closed(pruned.gates, "channels")
    assert all((164 - count) % 8 == 0 for count in counts if count)
    assert sum(counts) <= 3 * 52 and len(set(counts)) > 1


def test_layers_that_go_take_no_part_in_it() -> None:
    model = spare(llama(num_hidden_layers=4), 1)
    config = PruneConfig(layers=0.25, channels=0.25, uniform=False)
    pruned = prune(model, likely_text(model), config, layer_order=(3,))
    counts = closed(pruned.gates, "channels", 4)
    assert counts[3] == 12 and sum(counts) == 48 and counts[1] == max(counts)


def test_a_plan_may_prune_layers_differently(tmp_path: Path) -> None:
    model = spare(llama(), 1)
    own = likely_text(model)
    config = PlanConfig(0.1, parts=("channels",), uniform=False)
    plan = plan_pruning(model, own[1:], own[:1], config, controls=False)
    assert not plan.config.uniform
    pruned = prune(model, own[1:], plan.config)
    assert len(set(closed(pruned.gates, "channels"))) > 1
    pruned.save(tmp_path / "pruned")
    pruned.detach()
    assert Pruned.load(model, tmp_path / "pruned").config == plan.config


# --- export --------------------------------------------------------------------------------------


def uneven(model: Any) -> Any:
    """Close 8, 4 and 4 channels, and 4 and 2 heads of two of the layers."""
    gates = attach(model, GateConfig(("channels", "heads")))
    with torch.no_grad():
        for layer, count in enumerate((8, 4, 4)):
            gates["channels", layer][:count] = 0
        gates["heads", 0][:4] = 0
        gates["heads", 1][2:4] = 0
    return model


def test_uneven_layers_are_refused_and_what_works_is_offered(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"heads \(layer 0 50%, .*zeros=True"):
        export(uneven(llama()), tmp_path / "smaller")
    assert list(tmp_path.iterdir()) == []


def test_what_all_layers_lose_is_removed_and_the_rest_is_zero(tmp_path: Path) -> None:
    model = uneven(llama())
    result = export(model, tmp_path / "smaller", zeros=True)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "smaller").eval()
    assert again.config.intermediate_size == 44 and again.config.num_attention_heads == 8
    assert result.removed == {"channels": 12} and result.zeroed == {"channels": 4, "heads": 6}
    assert "12 channels removed, 6 heads, 4 channels zero" in str(result)
    assert torch.allclose(logits(again), logits(model), atol=1e-5)


def test_a_layer_that_goes_does_not_keep_the_others_wide(tmp_path: Path) -> None:
    model = llama()
    gates = attach(model, GateConfig(("channels", "layers")))
    with torch.no_grad():
        gates["layers", 1].zero_()
        gates["channels", 0][:8] = 0
        gates["channels", 2][:16] = 0
    export(model, tmp_path / "smaller", zeros=True)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "smaller").eval()
    assert again.config.intermediate_size == 40 and again.config.num_hidden_layers == 2
    assert torch.allclose(logits(again), logits(model), atol=1e-5)


def test_heads_without_a_smaller_form_become_zero(tmp_path: Path) -> None:
    model = gpt2()
    prune(model, text(), PruneConfig(heads=0.5))
    with pytest.raises(UnsupportedModel, match="zeros=True"):
        export(model, tmp_path / "smaller")
    result = export(model, tmp_path / "smaller", zeros=True)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "smaller").eval()
    assert result.removed == {} and result.zeroed == {"heads": 4}
    assert torch.allclose(logits(again), logits(model), atol=1e-5)


def test_a_config_with_a_width_for_each_layer_takes_uneven_layers(tmp_path: Path) -> None:
    config = tiny_config("gemma3n_text")
    # Its first layers cut off activations by the mean of all channels, so none can go there.
    config.activation_sparsity_pattern = [0.0] * config.num_hidden_layers
    model = tiny_model(config)
    gates = attach(model, GateConfig(("channels",)))
    with torch.no_grad():
        for layer in range(len(gates.sites)):
            gates["channels", layer][: 4 * (layer % 3)] = 0
    result = export(model, tmp_path / "smaller")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "smaller").eval()
    whole = gates.sites[0].count
    assert again.config.intermediate_size[:3] == [whole, whole - 4, whole - 8]
    assert result.removed["channels"] == sum(4 * (i % 3) for i in range(len(gates.sites)))
    assert torch.allclose(logits(again), logits(model), atol=1e-5)


def test_streaming_zeroes_as_well(tmp_path: Path) -> None:
    model = uneven(llama())
    model.save_pretrained(tmp_path / "base")
    gates = attached(model)["structure"]
    gates.save_pretrained(tmp_path / "gates")
    with pytest.raises(UnsupportedModel, match="different shares"):
        export_from_disk(tmp_path / "base", [tmp_path / "gates"], tmp_path / "smaller")
    result = export_from_disk(
        tmp_path / "base", [tmp_path / "gates"], tmp_path / "smaller", zeros=True
    )
    assert result.removed == {"channels": 12} and result.zeroed == {"channels": 4, "heads": 6}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "smaller").eval()
    assert torch.allclose(logits(again), logits(model), atol=1e-5)
