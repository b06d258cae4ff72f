"""AdaptiveModel: gates block by block, on the baseline model itself."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.minimal_adapter import anatomy_of, same_anatomy
from tests.structure.models import ARCHITECTURES, IDS, logits, model, same_bits

from pliant import load_adaptive_model, load_baseline_model
from pliant.errors import AdapterError, InvalidInput, ModelNotFound, UnsupportedModel
from pliant.structure import GateConfig, Gates, attach
from pliant.structure.facade import AdaptiveModel


def adaptive(name: str = "llama") -> AdaptiveModel:
    return load_adaptive_model(name, model(name), "cpu")


def write(model: AdaptiveModel, layer: int, head: int, value: float) -> None:
    with torch.no_grad():
        model.blocks[layer]["attn"].gate[head] = value


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_same_code_gates_every_architecture(name: str) -> None:
    baseline = model(name)
    before, parts = logits(baseline), anatomy_of(baseline)
    model_ = load_adaptive_model(name, baseline, "cpu")
    assert model_.model is baseline, "never copied"
    assert len(model_.blocks) == baseline.config.num_hidden_layers
    assert model_.blocks[1]["attn"].num_heads == baseline.config.num_attention_heads
    assert same_bits(logits(model_), before)
    write(model_, 1, 3, 0)
    closed = logits(model_)
    assert not torch.allclose(closed, before, atol=1e-4)
    assert model_.detach() is baseline
    assert same_anatomy(anatomy_of(baseline), parts) and same_bits(logits(baseline), before)
    gates = attach(baseline)
    with torch.no_grad():
        gates["heads", 1][3] = 0
    assert same_bits(logits(baseline), closed)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_generation_with_the_cache_equals_generation_without(name: str) -> None:
    model_ = adaptive(name)
    write(model_, 0, 0, 0.001)
    write(model_, 1, 2, 0.4)
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    tokens = [model_.generate(IDS, use_cache=cache, **settings) for cache in (True, False)]
    assert tokens[0].shape == (2, 16) and torch.equal(*tokens)


def test_the_gate_can_be_assigned_and_trained() -> None:
    model_ = adaptive()
    attention = model_.blocks[1]["attn"]
    gate = attention.gate
    assert isinstance(gate, torch.nn.Parameter) and gate is model_.gates["heads", 1]
    with torch.no_grad():
        attention.gate *= 0.5
        assert gate.tolist() == [0.5] * 4
    attention.gate = torch.tensor([1, 0.5, 0.25, 1])
    assert gate is attention.gate and gate.tolist() == [1, 0.5, 0.25, 1]
    model_(IDS, labels=IDS).loss.backward()
    assert gate.grad is not None and bool(gate.grad.all())


def test_layers_without_attention_have_no_block() -> None:
    """So that the seed's loop over blocks runs on hybrids as on any other model."""
    model_ = adaptive("qwen3_next")
    layers = len(model_.gates.anatomy.layers)
    assert [block.layer for block in model_.blocks] == [1, 3] and layers == 4
    before = logits(model_)
    for n in range(len(model_.blocks)):
        for h in range(model_.blocks[0]["attn"].num_heads):
            write(model_, n, h, 0.001)
    assert bool((model_.gates["heads", 3] == torch.tensor(0.001)).all())
    assert not torch.allclose(logits(model_), before, atol=1e-4)
    with pytest.raises(UnsupportedModel, match="layer 1 has no 'mlp' to gate, only attn"):
        model_.blocks[0]["mlp"]


def test_a_mixture_of_attention_has_blocks_too() -> None:
    model_ = adaptive("jetmoe")
    before = logits(model_)
    assert len(model_.blocks) == 4 and model_.blocks[0]["attn"].num_heads == 8
    write(model_, 1, 3, 0)
    assert not torch.equal(logits(model_), before)


def test_a_model_without_attention_is_refused_and_left_as_it_is() -> None:
    mamba = model("mamba")
    parts = anatomy_of(mamba)
    with pytest.raises(UnsupportedModel, match="no heads to gate"):
        load_adaptive_model("mamba", mamba, "cpu")
    assert same_anatomy(anatomy_of(mamba), parts)


def test_a_layer_with_two_attention_blocks_has_both() -> None:
    block = adaptive("longcat_flash").blocks[0]
    assert list(block) == ["attn", "attn_1"] and block["attn_1"].block == 1
    assert block["attn"].gate is not block["attn_1"].gate


def test_a_second_conversion_is_refused() -> None:
    model_ = adaptive()
    with pytest.raises(AdapterError, match=r"already .*detach"):
        load_adaptive_model("llama", model_.model, "cpu")
    model_.detach()
    load_adaptive_model("llama", model_.model, "cpu")


def test_the_baseline_runs_without_the_gates_when_they_are_disabled() -> None:
    baseline = model()
    before = logits(baseline)
    model_ = load_adaptive_model("llama", baseline)
    write(model_, 0, 0, 0)
    assert not same_bits(logits(baseline), before), "one model, one set of gates"
    with model_.gates.disabled():
        assert same_bits(logits(baseline), before)


def test_its_state_holds_the_gates_and_the_models_own_does_not() -> None:
    model_ = adaptive()
    keys = set(model().state_dict())
    assert set(model_.model.state_dict()) == keys
    write(model_, 3, 1, 0.25)
    state = model_.state_dict()
    assert {key.removeprefix("model.") for key in state if key.startswith("model.")} == keys
    again = adaptive()
    again.load_state_dict(state)
    assert again.blocks[3]["attn"].gate[1] == 0.25
    assert same_bits(logits(again), logits(model_))


def test_it_moves_and_copies_as_one_module() -> None:
    model_ = adaptive()
    parameters = list(model_.parameters())
    assert len(parameters) == len({id(p) for p in parameters})
    assert any(p is model_.blocks[0]["attn"].gate for p in parameters)
    assert not model_.train(False).gates.training and model_.train().model.training
    copied = copy.deepcopy(model_.eval())
    write(copied, 0, 0, 0)
    assert model_.blocks[0]["attn"].gate[0] == 1
    assert not torch.allclose(logits(copied), logits(model_), atol=1e-4)
    model_.to(torch.bfloat16)
    assert model_.model.dtype == torch.bfloat16
    assert model_.blocks[0]["attn"].gate.dtype == torch.float32, "gates keep their precision"
    assert logits(model_).dtype == torch.bfloat16


def test_its_gates_are_saved_as_any_adapter(tmp_path: Path) -> None:
    model_ = adaptive()
    write(model_, 1, 1, 0.5)
    expected = logits(model_)
    model_.gates.save_pretrained(tmp_path)
    baseline = model_.detach()
    Gates.from_pretrained(baseline, tmp_path)
    assert same_bits(logits(baseline), expected)


def test_names_and_devices_that_lead_nowhere() -> None:
    with pytest.raises(ModelNotFound):
        load_baseline_model("nano-x")
    with pytest.raises(InvalidInput, match="device"):
        load_adaptive_model("llama", model(), "warp")


def test_gates_of_other_kinds_stay_beside_it() -> None:
    baseline = model()
    layers = attach(baseline, GateConfig(("layers",)), name="layers")
    model_ = AdaptiveModel(baseline)
    before = logits(model_)
    with torch.no_grad():
        layers["layers", 1][0] = 0
    assert not torch.allclose(logits(model_), before, atol=1e-4)


def test_forward_takes_what_the_model_takes() -> None:
    model_: Any = adaptive()
    embedded = model_.model.get_input_embeddings()(IDS)
    assert torch.equal(model_(inputs_embeds=embedded).logits, model_(IDS).logits)
    assert model_.config is model_.model.config and model_.device == torch.device("cpu")
