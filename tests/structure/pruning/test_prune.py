"""Pruning closes gates and gives the rest new weights; taken off, the model is as it was."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.minimal_adapter import anatomy_of, logits, same_anatomy
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from pliant.adapters import attached
from pliant.anatomy.tiny import tiny_model
from pliant.errors import CorruptFile, InvalidInput, UnsupportedModel
from pliant.structure import (
    GateConfig,
    ImportanceConfig,
    PruneConfig,
    Pruned,
    attach,
    export,
    importance,
    perplexity,
    prune,
    sites_of,
)
from pliant.structure.pruning.compensation import Compensation, CompensationConfig


def llama(**changes: Any) -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 64}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, **changes})).eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64)).eval()


def text(seed: int = 0, rows: int = 4, padding: bool = False) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(3):
        ids = torch.randint(5, 60, (rows, 24), generator=generator)
        mask = torch.ones_like(ids)
        if padding:
            mask[0, 10:] = 0
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


@pytest.mark.parametrize("make", [llama, gpt2], ids=["llama", "gpt2"])
def test_pruning_changes_the_model_and_comes_off(make: Any) -> None:
    model = make()
    before, base = anatomy_of(model), logits(model)
    pruned = prune(model, text(), PruneConfig(heads=0.5, channels=0.25))
    assert not torch.equal(logits(model), base)
    pruned.detach()
    assert torch.equal(logits(model), base)
    assert same_anatomy(anatomy_of(model), before)


def test_as_many_units_go_in_every_layer_as_were_asked_for() -> None:
    model = llama()
    pruned = prune(model, text(), PruneConfig(heads=0.5, channels=0.25))
    for site in sites_of(pruned.gates.anatomy, ["heads", "channels"]):
        closed = int((pruned.gates[site.kind, site.layer] == 0).sum())
        assert closed == (4 if site.kind == "heads" else 12)
        assert len(pruned.removed[site.kind][site.key]) == (2 if site.kind == "heads" else 12)
    heads = pruned.gates["heads", 0].view(4, 2)
    assert torch.equal(heads[:, 0], heads[:, 1])  # both heads of a KV group go, or none


def test_of_many_channels_a_multiple_of_eight_stays() -> None:
    model = llama(intermediate_size=160)
    pruned = prune(model, text(), PruneConfig(channels=0.33))
    assert {int((pruned.gates["channels", i] != 0).sum()) for i in range(3)} == {104}  # of 107.2


def relative_error(model: Any, base: Tensor) -> float:
    return float((logits(model) - base).norm() / base.norm())


@pytest.mark.parametrize("kind", ["heads", "channels"])
def test_compensation_brings_the_outputs_closer(kind: str) -> None:
    model = llama()
    base = logits(model)
    errors = {}
    for name, options in {
        "compensated": {},
        "not": {"compensate": False},
        "random, compensated": {"score": "random"},
    }.items():
        pruned = prune(model, text(rows=16), PruneConfig(**{kind: 0.5}, **options))
        errors[name] = sum(sum(sites.values()) for sites in pruned.errors.values())
        assert relative_error(model, base) > 0
        pruned.detach()
    assert errors["compensated"] < errors["random, compensated"]
    assert errors["compensated"] < 0.8 * errors["not"]


@pytest.mark.parametrize("score", ["magnitude", "random"])
def test_without_compensation_simple_scores_need_no_text(score: str) -> None:
    model = llama()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, :12] *= 1e-3
    chosen = []
    for batches in (text(0), text(1)):
        pruned = prune(model, batches, PruneConfig(channels=0.25, score=score, compensate=False))
        chosen.append(pruned.removed["channels"])
        assert int((pruned.gates["channels", 1] == 0).sum()) == 12
        pruned.detach()
    assert chosen[0] == chosen[1]
    assert (sorted(chosen[0]["0"]) == list(range(12))) == (score == "magnitude")


def test_padding_does_not_count() -> None:
    model = llama()
    padded = text(padding=True)
    other = [{**b, "input_ids": b["input_ids"].clone()} for b in padded]
    for batch in other:
        batch["input_ids"][0, 10:] = 7
    weights = []
    for batches in (padded, other):
        pruned = prune(model, batches, PruneConfig(channels=0.25))
        assert pruned.compensation is not None
        weights.append([w.clone() for w in pruned.compensation.parameters()])
        pruned.detach()
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*weights, strict=True))


def test_channels_that_do_nothing_go_first_and_nothing_is_lost() -> None:
    model = llama()
    useless = [3, 8, 9, 20, 21, 22, 30, 40, 41, 42, 43, 47]
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, useless] = 0
    base = logits(model)
    pruned = prune(model, text(), PruneConfig(channels=0.25))
    for removed in pruned.removed["channels"].values():
        assert sorted(removed) == useless
    assert relative_error(model, base) < 1e-3


def test_perplexity_is_that_of_the_models_own_loss() -> None:
    model = llama()
    batches = text()
    with torch.no_grad():
        losses = [model(**b, labels=b["input_ids"]).loss for b in batches]
    expected = math.exp(float(torch.stack(losses).mean()))
    assert perplexity(model, batches) == pytest.approx(expected, rel=1e-4)


def test_an_error_on_the_way_leaves_the_model_as_it_was() -> None:
    model = llama()
    before = anatomy_of(model)

    def report(*_: object) -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        prune(model, text(), PruneConfig(channels=0.25), report=report)
    assert same_anatomy(anatomy_of(model), before)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "nothing to prune"),
        ({"channels": 1.0}, "channels = 1.0"),
        ({"heads": -0.1}, "heads = -0.1"),
        ({"layers": 1}, "layers = 1"),
        ({"channels": 0.5, "score": "best"}, "score = 'best'"),
        ({"channels": 0.5, "damping": 0}, "damping = 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        PruneConfig(**options)


def test_a_share_that_removes_nothing_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"heads = 0.05: of 4"):
        prune(llama(), text(), PruneConfig(heads=0.05))
    with pytest.raises(InvalidInput, match="layers = 0.1: of 3 that can go that is 0"):
        prune(llama(), text(), PruneConfig(layers=0.1))
    with pytest.raises(InvalidInput, match="no calibration text"):
        prune(llama(), [], PruneConfig(heads=0.5))


# --- layers --------------------------------------------------------------------------------------


def with_update(model: LlamaForCausalLM, layer: int, scale: float) -> None:
    """Scale what a layer adds to the hidden states."""
    with torch.no_grad():
        model.model.layers[layer].self_attn.o_proj.weight.mul_(scale)
        model.model.layers[layer].mlp.down_proj.weight.mul_(scale)


def likely_text(model: Any) -> list[dict[str, Tensor]]:
    """Text with the model's own predictions as labels, so that every change costs something."""
    batches = text()
    for batch in batches:
        with torch.no_grad():
            predicted = model(**batch).logits.argmax(dim=-1)
        batch["labels"] = torch.cat([predicted[:, :1], predicted[:, :-1]], dim=1)
    return batches


@pytest.mark.parametrize("score", ["error", "activation", "magnitude", "leave_one_out"])
def test_a_layer_that_does_nothing_goes_first(score: str) -> None:
    model = llama(num_hidden_layers=4)
    with_update(model, 2, 1e-4)
    base = logits(model)
    pruned = prune(model, likely_text(model), PruneConfig(layers=0.25, score=score))
    assert pruned.removed["layers"] == {"2": (0,)}
    assert relative_error(model, base) < 1e-2
    pruned.detach()
    assert torch.equal(logits(model), base)


@pytest.mark.parametrize(
    ("name", "new_weights"),
    [("gpt2", 4), ("gemma2", 4), ("olmo2", 4), ("gpt_neox", 4), ("mixtral", 0), ("mamba", 0)],
)
def test_layers_go_on_every_kind_of_architecture(
    name: str, new_weights: int, tmp_path: Path
) -> None:
    """Also where a norm follows the projection, or no projection ends the layer."""
    model = tiny_model(name)
    before, base = anatomy_of(model), logits(model)
    pruned = prune(model, text(), PruneConfig(layers=0.25))
    own = pruned.compensation
    assert (0 if own is None else len(own.sites)) == new_weights
    live = logits(model)
    assert not torch.equal(live, base)
    export(model, tmp_path / "smaller")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "smaller").eval()
    assert torch.allclose(logits(again), live, atol=1e-5)
    pruned.detach()
    assert torch.equal(logits(model), base)
    assert same_anatomy(anatomy_of(model), before)


def test_a_model_with_several_states_for_each_token_loses_layers_too() -> None:
    model = tiny_model("gemma3n_text")
    base = logits(model)
    pruned = prune(model, text(), PruneConfig(layers=0.25))
    assert not torch.equal(logits(model), base)
    pruned.detach()
    assert torch.equal(logits(model), base)


@pytest.mark.parametrize("name", ["jamba", "deepseek_v3", "zamba2"])
@pytest.mark.parametrize("score", ["error", "random", "magnitude", "activation"])
def test_those_layers_go_without_which_a_stock_model_remains(
    name: str, score: Any, tmp_path: Path
) -> None:
    """In a Jamba what a layer is follows from its place, so only the last one can go."""
    model = tiny_model(name)
    prune(model, text(), PruneConfig(layers=0.25, score=score, seed=1, compensate=False))
    result = export(model, tmp_path / "smaller")
    assert result.removed == {"layers": 1}


def test_layers_go_in_the_order_that_is_known() -> None:
    pruned = prune(llama(num_hidden_layers=4), text(), PruneConfig(layers=0.5), layer_order=(0, 2))
    assert list(pruned.removed["layers"]) == ["0", "2"]


def test_layers_heads_and_channels_go_together(tmp_path: Path) -> None:
    model = llama(num_hidden_layers=4)
    pruned = prune(model, text(), PruneConfig(layers=0.25, heads=0.5, channels=0.25))
    (gone,) = pruned.removed["layers"]
    assert int((pruned.gates["channels", int(gone)] == 0).sum()) == 12  # as in every layer
    result = export(model, tmp_path / "smaller")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "smaller").eval()
    assert again.config.num_hidden_layers == 3 and result.removed["layers"] == 1
    assert torch.allclose(logits(again), logits(model), atol=1e-5)


def test_new_weights_before_a_layer_that_goes_are_exported(tmp_path: Path) -> None:
    model = llama(num_hidden_layers=4)
    prune(model, text(), PruneConfig(layers=0.5))
    live = logits(model)
    export(model, tmp_path / "smaller")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "smaller").eval()
    assert torch.allclose(logits(again), live, atol=1e-5)


@pytest.mark.parametrize("score", ["fisher", "taylor"])
def test_units_go_by_their_importance(score: str) -> None:
    model = llama()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, :12] *= 1e-3
    pruned = prune(model, likely_text(model), PruneConfig(channels=0.25, score=score))
    assert all(sorted(units) == list(range(12)) for units in pruned.removed["channels"].values())


# --- export --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {"heads": 0.5}),
        ("llama", {"heads": 0.5, "channels": 0.25}),
        ("qwen3", {"heads": 0.5, "channels": 0.25}),
        ("phi3", {"heads": 0.5, "channels": 0.25}),
        ("gemma2", {"channels": 0.5}),
        ("gpt2", {"channels": 0.5}),
        ("gpt_neox", {"channels": 0.5}),
        ("mixtral", {"heads": 0.5}),
    ],
)
def test_the_exported_model_is_smaller_and_computes_the_same(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model = tiny_model(name)
    base = logits(model)
    prune(model, text(), PruneConfig(**options))
    live = logits(model)
    result = export(model, tmp_path / "smaller")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "smaller").eval()
    assert torch.allclose(logits(again), live, atol=1e-5)
    assert not torch.allclose(live, base, atol=1e-4)
    assert result.parameters == sum(p.numel() for p in again.parameters())
    assert result.parameters < result.parameters_before
    assert "pliant" not in (tmp_path / "smaller" / "config.json").read_text()


def test_a_llama_with_odd_heads_becomes_a_mistral(tmp_path: Path) -> None:
    """A Llama's hidden size must be a multiple of its heads: 32 is none of 6."""
    model = llama()
    prune(model, text(), PruneConfig(heads=0.25))
    result = export(model, tmp_path / "smaller")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "smaller").eval()
    assert result.architecture == "MistralForCausalLM"
    assert torch.allclose(logits(again), logits(model), atol=1e-5)


def test_layers_are_removed_and_other_gates_multiplied_in(tmp_path: Path) -> None:
    model = llama()
    gates = attach(model, GateConfig(("heads", "channels", "layers")))
    with torch.no_grad():
        gates["layers", 1].zero_()
        gates["heads", 0][:] = torch.linspace(0.5, 1.5, 8)
        gates["channels", 2][:] = torch.linspace(0.5, 1.5, 48)
    result = export(model, tmp_path / "smaller")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "smaller").eval()
    assert again.config.num_hidden_layers == 2 and result.removed == {"layers": 1}
    assert torch.allclose(logits(again), logits(model), atol=1e-5)


def test_heads_and_a_layer_are_removed_together(tmp_path: Path) -> None:
    model = llama()
    gates = attach(model, GateConfig(("heads", "layers")))
    with torch.no_grad():
        gates["layers", 1].zero_()
        for i in range(3):
            gates["heads", i][4:] = 0
    result = export(model, tmp_path / "smaller")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "smaller").eval()
    assert result.removed == {"heads": 12, "layers": 1}
    assert torch.allclose(logits(again), logits(model), atol=1e-5)


def test_a_bf16_model_is_exported_in_bf16(tmp_path: Path) -> None:
    model = llama().bfloat16()
    prune(model, text(), PruneConfig(channels=0.25))
    export(model, tmp_path / "smaller")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "smaller").eval()
    assert again.dtype == torch.bfloat16
    assert torch.allclose(logits(again), logits(model), atol=0.05)


def test_what_has_no_stock_form_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    model = gpt2()
    prune(model, text(), PruneConfig(heads=0.5))
    with pytest.raises(UnsupportedModel, match="no stock form with 2 heads"):
        export(model, tmp_path / "smaller")
    assert list(tmp_path.iterdir()) == []


def test_different_shares_in_each_layer_are_refused(tmp_path: Path) -> None:
    model = llama()
    gates = attach(model, GateConfig(("channels",)))
    with torch.no_grad():
        gates["channels", 0][:4] = 0
    with pytest.raises(UnsupportedModel, match="layers lose different shares"):
        export(model, tmp_path / "smaller")
    with torch.no_grad():
        gates["channels", 0].fill_(1)
    other = attach(model, GateConfig(("layers",)), name="half")
    with torch.no_grad():
        other["layers", 0].fill_(0.5)
    with pytest.raises(UnsupportedModel, match="layer 0 has a gate of 0.5"):
        export(model, tmp_path / "smaller")


def test_lora_layers_are_to_be_merged_first(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["down_proj"]))
    with pytest.raises(UnsupportedModel, match="merge_and_unload"):
        export(model, tmp_path / "smaller")
    assert list(tmp_path.iterdir()) == []


def test_a_model_in_train_mode_is_exported_as_in_eval_mode(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, resid_pdrop=0.5)
    model = GPT2LMHeadModel(config).train()
    prune(model, text(), PruneConfig(channels=0.25))
    export(model, tmp_path / "smaller")
    assert model.training
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "smaller").eval()
    assert torch.allclose(logits(again), logits(model.eval()), atol=1e-5)


def test_a_folder_that_is_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(InvalidInput, match="name a new folder"):
        export(llama(), tmp_path)
    assert (tmp_path / "mine").read_text() == "mine"


def test_new_weights_are_saved_and_loaded(tmp_path: Path) -> None:
    model = llama()
    pruned = prune(model, text(), PruneConfig(channels=0.25))
    expected = logits(model)
    assert pruned.compensation is not None
    pruned.compensation.save_pretrained(tmp_path / "weights")
    pruned.gates.save_pretrained(tmp_path / "gates")
    pruned.detach()
    type(pruned.gates).from_pretrained(model, tmp_path / "gates")
    Compensation.from_pretrained(model, tmp_path / "weights", name="compensation")
    assert torch.equal(logits(model), expected)


def test_pruning_is_saved_whole_or_not_at_all(tmp_path: Path) -> None:
    """Gates alone would be exported as another model."""
    pruned = prune(llama(), text(), PruneConfig(channels=0.25))
    broken = replace(pruned, errors={"channels": {"0": object()}})  # type: ignore[dict-item]
    with pytest.raises(TypeError):
        broken.save(tmp_path / "pruned")
    assert not list(tmp_path.iterdir())
    pruned.save(tmp_path / "pruned")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InvalidInput, match="name a new folder"):
        pruned.save(tmp_path / "pruned")
    assert sorted(tmp_path.rglob("*")) == before
    pruned.detach()
    again = Pruned.load(llama(), tmp_path / "pruned")
    assert again.as_dict() == pruned.as_dict()


@pytest.mark.parametrize("removed", [[1], "x", {"heads": 1}, {"heads": {"0": ["x"]}}, None])
def test_a_damaged_record_is_named(removed: object, tmp_path: Path) -> None:
    saved = {"config": {"heads": 0.3}, "removed": removed, "errors": {}}
    (tmp_path / "pruned.json").write_text(json.dumps(saved))
    with pytest.raises(CorruptFile, match=r"pruned\.json: damaged \(removed"):
        Pruned.load(llama(), tmp_path)


def test_scores_that_are_measured_already_are_used() -> None:
    model, batches, config = llama(), text(), PruneConfig(heads=0.25, score="fisher")
    own = importance(model, batches, ImportanceConfig(("heads",), "fisher"))
    again = prune(model, batches, config)
    again.detach()
    pruned = prune(model, batches, config, scores=own)
    pruned.detach()
    assert pruned.removed == again.removed
    turned = replace(own, units={"heads": {k: -v for k, v in own.units["heads"].items()}})
    other = prune(model, batches, config, scores=turned)
    other.detach()
    assert other.removed != pruned.removed
    with pytest.raises(InvalidInput, match="by fisher, not by taylor"):
        prune(model, batches, replace(config, score="taylor"), scores=own)
    assert not attached(model)


@pytest.mark.parametrize("score", ["activation", "magnitude", "random"])
def test_scores_that_prune_measures_as_it_walks_are_refused(score: Any) -> None:
    model, batches = llama(), text()
    own = importance(model, batches, ImportanceConfig(("heads",), score))
    with pytest.raises(InvalidInput, match=f"by {score} are not those that prune ranks by"):
        prune(model, batches, PruneConfig(heads=0.25, score=score), scores=own)
    assert not attached(model)


@pytest.mark.parametrize(
    ("changes", "units", "words"),
    [
        ({}, ("channels",), "heads were not ranked"),
        ({"num_attention_heads": 4}, ("heads",), "of 4 heads in layer 0, and this model has 8"),
        ({"num_hidden_layers": 2}, ("heads",), "layer 2 has no heads"),
    ],
)
def test_scores_of_another_model_are_refused(changes: Any, units: Any, words: str) -> None:
    model, batches = llama(), text()
    own = importance(llama(**changes), batches, ImportanceConfig(units, "fisher"))
    with pytest.raises(InvalidInput, match=words):
        prune(model, batches, PruneConfig(heads=0.25, score="fisher"), scores=own)
    assert not attached(model)


@pytest.mark.parametrize("site", [("heads", "/etc/passwd"), ("heads", []), ("channels", "99")])
def test_new_weights_for_a_site_the_model_lacks_are_refused(site: Any) -> None:
    with pytest.raises(InvalidInput, match=r"the model has no|the key of heads is a text"):
        Compensation(tiny_model("llama"), CompensationConfig((site,)))
