"""Gates on quantised, LoRA-wrapped and tied models, and beside a scorer and selective training."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.minimal_adapter import anatomy_of, same_anatomy, trained
from tests.structure.models import IDS, logits, same_bits
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from pliant import complexity, gradients
from pliant.adapters.quantized import PACKS
from pliant.errors import AdapterError, UnsupportedModel
from pliant.gradients import GradientConfig
from pliant.structure import (
    GateConfig,
    Gates,
    ImportanceConfig,
    PruneConfig,
    attach,
    export,
    importance,
    prune,
)
from pliant.structure.agency import attach_agency
from pliant.structure.pruning.compensation import dense_weight
from pliant.structure.skips import attach as attach_skips

KINDS = ("heads", "channels", "layers", "attention", "mlp")
BITS = {
    "8 bits": BitsAndBytesConfig(load_in_8bit=True),
    "4 bits": BitsAndBytesConfig(load_in_4bit=True),
    "nf4, scales in 8 bits": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ),
}
quantized = pytest.mark.parametrize("how", BITS.values(), ids=BITS.keys())
TEXT = torch.randint(5, 95, (16, 32), generator=torch.Generator().manual_seed(1))
BATCH = [{"input_ids": TEXT}]


def llama(**changes: Any) -> LlamaForCausalLM:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 96}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(**{**sizes, **heads, "initializer_range": 0.15, **changes})
    ).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    where = tmp_path_factory.mktemp("base")
    llama().save_pretrained(where)
    yield where


def load(folder: Path, how: BitsAndBytesConfig) -> Any:
    """As it computes on a GPU: a CPU packs 4-bit layers unless an adapter needs their gradient."""
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=how).eval()
    for module in model.modules():
        if hasattr(module, PACKS):
            setattr(module, PACKS, False)
    return model


def lora(model: Any) -> Any:
    """LoRAs that act, on the projections whose inputs are gated and on others."""
    torch.manual_seed(3)
    config = LoraConfig(
        r=4, target_modules=["q_proj", "o_proj", "down_proj"], init_lora_weights=False
    )
    return get_peft_model(model, config).eval()


def scattered(gates: Gates) -> Gates:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for gate in gates.parameters():
            gate.copy_(torch.rand(gate.shape, generator=generator))
        gates["heads", 0][1] = 0
    return gates


# --- quantised -----------------------------------------------------------------------------------


@quantized
def test_gates_on_a_quantised_base_keep_the_laws(
    folder: Path, how: BitsAndBytesConfig, tmp_path: Path
) -> None:
    model = load(folder, how)
    before = logits(model)
    gates = attach(model, GateConfig(KINDS))
    assert same_bits(logits(model), before)
    scattered(gates)
    gated = logits(model)
    assert not torch.allclose(gated, before, atol=1e-3)
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    for gradient in torch.autograd.grad(loss, list(gates.parameters())):
        assert bool(gradient.any())
    gates.save_pretrained(tmp_path)
    gates.detach()
    assert same_bits(logits(model), before)
    Gates.from_pretrained(model, tmp_path)
    assert same_bits(logits(model), gated)


@pytest.mark.parametrize("how", [BITS["8 bits"], BITS["4 bits"]], ids=["8 bits", "4 bits"])
def test_a_quantised_base_is_ranked_and_pruned_as_its_own_weights_are(
    folder: Path, how: BitsAndBytesConfig, tmp_path: Path
) -> None:
    model = load(folder, how)
    before = logits(model)
    whole = _dense(model)
    for score in ("fisher", "magnitude", "activation"):
        config = ImportanceConfig(("heads", "channels"), score)  # type: ignore[arg-type]
        ours, theirs = importance(model, BATCH, config), importance(whole, BATCH, config)
        both = torch.stack([ours["channels", 0], theirs["channels", 0]])
        assert torch.corrcoef(both)[0, 1] > 0.9, score
    relative = {}
    for compensate in (True, False):
        pruned = prune(model, BATCH, PruneConfig(channels=0.5, compensate=compensate))
        relative[compensate] = float((logits(model) - before).norm() / before.norm())
        if compensate:
            with pytest.raises(UnsupportedModel, match="quantised"):
                export(model, tmp_path / "smaller")
        pruned.detach()
        assert same_bits(logits(model), before)
    assert 0 < relative[True] < relative[False]


def _dense(model: Any) -> LlamaForCausalLM:
    """A model with the weights that the quantised one multiplies by."""
    whole = llama()
    with torch.no_grad():
        for name, module in whole.model.layers.named_modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.copy_(dense_weight(model.model.layers.get_submodule(name)))
    return whole


# --- LoRA ----------------------------------------------------------------------------------------


def test_gates_scale_what_a_lora_sees_whichever_comes_first() -> None:
    first = llama()
    base = logits(first)
    gates = attach(first, GateConfig(KINDS))
    gated_base = logits(scattered(gates).base)
    agency = attach_agency(gates)
    agency.set_head_state(1, 0, "withdrawn")
    wrapped_after = lora(first)
    second = lora(llama())
    before = logits(second)
    later = attach(second, GateConfig(KINDS))
    assert same_bits(logits(second), before)
    scattered(later)
    attach_agency(later).set_head_state(1, 0, "withdrawn")
    gated = logits(second)
    assert not torch.allclose(gated, before, atol=1e-3)
    assert same_bits(logits(wrapped_after), gated)
    # And off again, in either order.
    assert not same_bits(gated, gated_base)
    unwrapped = wrapped_after.unload()
    agency.detach()
    assert same_bits(logits(unwrapped), gated_base)
    gates.detach()
    assert same_bits(logits(unwrapped), base)


def test_a_closed_head_is_closed_to_a_lora_as_well() -> None:
    model = llama()
    gates = attach(model, GateConfig(("heads",)))
    with torch.no_grad():
        gates["heads", 1][2] = 0
    wrapped = lora(model)
    layer = wrapped.get_base_model().model.layers[1].self_attn.o_proj
    seen: list[Tensor] = []
    layer.lora_A["default"].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    logits(wrapped)
    assert not seen[0][..., 32:48].any() and bool(seen[0][..., :32].any())


def test_a_gated_module_that_is_replaced_by_another_kind_is_missed() -> None:
    model = llama()
    gates = attach(model, GateConfig(("channels",)))
    mlp = model.model.layers[1].mlp
    mlp.down_proj = torch.nn.Linear(128, 64, bias=False)  # as a merge or a quantiser does
    before = logits(model)
    with torch.no_grad():
        gates["channels", 1][5:] = 0
    assert not torch.allclose(logits(model), before, atol=1e-4)
    mlp.down_proj = torch.nn.Sequential(torch.nn.Linear(128, 96), torch.nn.Linear(96, 64))
    with pytest.raises(AdapterError, match="channels of layer 1 are not those"):
        logits(model)
    with pytest.raises(AdapterError, match="channels of layer 1 are not those"):
        logits(model)


def test_rows_have_patterns_of_their_own_in_a_peft_model() -> None:
    model = llama()
    gates = attach(model, GateConfig(("heads",), patterns=("a", "b")))
    wrapped = lora(model)
    scattered(gates)
    rows = []
    for row, name in enumerate(("b", "a")):
        gates.use(name)
        rows.append(logits(wrapped)[row])
    with gates.rows(["b", "a"]):
        assert torch.allclose(logits(wrapped), torch.stack(rows), atol=1e-5)


def test_a_peft_model_is_ranked_and_pruned_with_its_lora(tmp_path: Path) -> None:
    wrapped = lora(llama())
    merged = lora(llama()).merge_and_unload()
    for score in ("fisher", "magnitude", "activation"):
        config = ImportanceConfig(("heads", "channels"), score)  # type: ignore[arg-type]
        ours, theirs = (importance(model, BATCH, config) for model in (wrapped, merged))
        for kind in config.units:
            assert torch.allclose(ours[kind, 1], theirs[kind, 1], rtol=1e-3), (score, kind)
    before = logits(wrapped)
    config_ = PruneConfig(heads=0.5, channels=0.25)
    ours_, theirs_ = prune(wrapped, BATCH, config_), prune(merged, BATCH, config_)
    assert ours_.removed == theirs_.removed
    assert torch.allclose(logits(wrapped), logits(merged), atol=1e-3)
    with pytest.raises(UnsupportedModel, match="merge"):
        export(wrapped, tmp_path / "smaller")
    ours_.detach()
    assert same_bits(logits(wrapped), before)


# --- tied embeddings, and beside others ----------------------------------------------------------


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=True)
    before = logits(model)
    gates = attach(model, GateConfig(("heads", "channels")))
    assert same_bits(logits(model), before)
    with torch.no_grad():
        for layer in range(2):
            gates["heads", layer][:2] = 0
            gates["channels", layer][64:] = 0
    gated = logits(model)
    export(model, tmp_path / "smaller")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "smaller")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert again.config.intermediate_size == 64
    assert torch.allclose(logits(again), gated, atol=1e-5)
    gates.detach()
    assert same_bits(logits(model), before)


def _scorer(model: Any) -> Any:
    return trained(complexity.attach(model, complexity.CPXConfig()))


def _selective(model: Any) -> Any:
    return gradients.attach(model, GradientConfig(ratio=0.5, selection="uniform"))


def _gates(model: Any) -> Any:
    return attach(model, GateConfig(("heads", "layers")))


def complexity_of(model: Any) -> Tensor:
    scorers = [a for a in model.pliant.children() if isinstance(a, complexity.Complexity)]
    return scorers[0].logits(IDS).detach()


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_in_any_order_beside_a_scorer_and_selective_training(
    order: tuple[int, ...], tmp_path: Path
) -> None:
    model = llama()
    before, parts = logits(model), anatomy_of(model)
    makers = (_gates, _scorer, _selective)
    own = {i: makers[i](model) for i in order}
    assert same_bits(logits(model), before)
    gates = own[0]
    scores = complexity_of(model)
    scattered(gates)
    gated, gated_scores = logits(model), complexity_of(model)
    assert not torch.allclose(gated_scores, scores) and not same_bits(gated, before)
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    model.zero_grad(set_to_none=True)
    model.eval()
    gates.save_pretrained(tmp_path)
    gates.detach()
    assert same_bits(complexity_of(model), scores)
    again = Gates.from_pretrained(model, tmp_path)
    assert same_bits(logits(model), gated) and same_bits(complexity_of(model), gated_scores)
    for adapter in (own[order[1]], own[order[2]], again):
        if adapter.name:
            adapter.detach()
    for adapter in own.values():
        if adapter.name:
            adapter.detach()
    assert same_bits(logits(model), before)
    assert same_anatomy(anatomy_of(model), parts)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("beside", ["gates", "skips"])
def test_selective_training_stays_sparse_beside_gates_and_skips(
    beside: str, checkpointing: bool
) -> None:
    model = llama(num_hidden_layers=4).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if beside == "gates":
        own_adapter: Any = scattered(attach(model, GateConfig(KINDS)))
    else:
        own_adapter = trained(attach_skips(model))
    own = {}
    for engine in ("sparse", "exact"):
        config = GradientConfig(engine=engine, ratio=0.5, selection="uniform", seed=1)  # type: ignore[arg-type]
        selective = gradients.attach(model, config)
        model.zero_grad(set_to_none=True)
        output = model(input_ids=IDS, labels=IDS)
        output.loss.backward()
        assert selective.engine == engine
        own[engine] = [output.loss.item(), *(p.grad.clone() for p in own_adapter.parameters())]
        selective.detach()
    assert own["sparse"][0] == pytest.approx(own["exact"][0], rel=1e-5)
    # What a gate of the last layer does reaches the loss through no other position's keys.
    names = [name for name, _ in own_adapter.named_parameters()]
    for name, ours, theirs in zip(names, own["sparse"][1:], own["exact"][1:], strict=True):
        assert bool(ours.any())
        if name.split(".")[-1] == "3" or name.split(".")[-2] == "3":
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
        else:
            assert ours.shape == theirs.shape
    assert any(name.split(".")[-1] == "3" or name.split(".")[-2] == "3" for name in names)
