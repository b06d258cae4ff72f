"""Routers choose among the experts that remain, as those of a smaller stock model do."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.structure.models import IDS, logits, same_bits
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from pliant.anatomy.tiny import tiny_config, tiny_model
from pliant.errors import InvalidInput, UnsupportedModel
from pliant.structure import (
    GateConfig,
    PruneConfig,
    RemainingExperts,
    attach,
    export,
    prune,
    sites_of,
)
from pliant.structure.pruning.remaining_experts import attach as attach_remaining
from pliant.structure.stock.smaller import parameters_with, with_fewer

INF = float("inf")


def all_lose(model: nn.Module, *experts: int) -> dict[str, tuple[int, ...]]:
    from pliant.anatomy import Anatomy

    return {site.key: experts for site in sites_of(Anatomy.of(model), ["experts"])}


def grouped(n_group: int = 2) -> Any:
    """A tiny DeepSeek-V3 of eight experts in groups, with a bias that decides between them."""
    config: Any = tiny_config("deepseek_v3")
    config.n_routed_experts, config.n_group, config.topk_group = 8, n_group, 1
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, buffer in model.named_buffers():
        if "correction_bias" in name:
            buffer.copy_(torch.randn(buffer.shape) / 4)
    return model


# --- the routers' own arithmetic -----------------------------------------------------------------


def mixtral(block: Any, x: Tensor, gone: list[int]) -> tuple[Tensor, Tensor]:
    scores = x @ block.gate.weight.T
    scores[:, gone] = -INF
    weights, index = scores.softmax(-1).topk(block.gate.top_k)
    return weights / weights.sum(-1, keepdim=True), index


def qwen2_moe(block: Any, x: Tensor, gone: list[int]) -> tuple[Tensor, Tensor]:
    scores = x @ block.gate.weight.T
    scores[:, gone] = -INF
    weights, index = scores.softmax(-1).topk(block.gate.top_k)
    return weights, index  # they do not sum to 1: what is left of the softmax goes nowhere


def deepseek_v3(block: Any, x: Tensor, gone: list[int]) -> tuple[Tensor, Tensor]:
    """Experts 0 to 3 are one group, 4 to 7 the other; `gone` takes one of each."""
    sigmoid = (x @ block.gate.weight.T).sigmoid()
    biased = sigmoid + block.gate.e_score_correction_bias
    biased[:, gone] = -INF
    halves = biased.view(-1, 2, 4)
    best = halves.topk(2).values.sum(-1).argmax(-1, keepdim=True)
    other = torch.arange(2) != best
    index = halves.masked_fill(other[..., None], -INF).flatten(1).topk(block.gate.top_k).indices
    weights = sigmoid.gather(1, index)
    return weights / weights.sum(-1, keepdim=True) * block.gate.routed_scaling_factor, index


@pytest.mark.parametrize(
    ("model", "choose", "gone"),
    [
        (tiny_model("mixtral"), mixtral, [1]),
        (tiny_model("qwen2_moe"), qwen2_moe, [2]),
        (grouped(), deepseek_v3, [2, 5]),
    ],
    ids=["mixtral", "qwen2_moe", "deepseek_v3"],
)
def test_it_is_as_if_the_removed_had_a_logit_of_minus_infinity(
    model: Any, choose: Any, gone: list[int]
) -> None:
    blocks = [m for m in model.modules() if hasattr(m, "gate") and hasattr(m, "experts")]
    inputs: list[Tensor] = []
    calls: list[tuple[Tensor, Tensor]] = []
    adapter = attach_remaining(model, all_lose(model, *gone))
    handles = [
        blocks[0].register_forward_pre_hook(lambda _, args: inputs.append(args[0])),
        blocks[0].experts.register_forward_pre_hook(lambda _, args: calls.append(args[1:3])),
    ]
    logits(model)
    for handle in handles:
        handle.remove()
    adapter.detach()
    (x,), ((index, weights),) = inputs, calls
    expected_weights, expected_index = choose(blocks[0], x.flatten(0, 1), gone)
    dense, expected = (torch.zeros(len(index), 8) for _ in range(2))
    dense.scatter_(1, index, weights)
    expected.scatter_(1, expected_index, expected_weights)
    assert torch.allclose(dense, expected, atol=1e-6)
    assert (dense > 0).sum() == index.numel()  # no token has fewer experts
    assert not dense[:, gone].any()


@pytest.mark.parametrize("name", ["mixtral", "llama4_text", "longcat_flash", "gpt_oss"])
def test_the_removed_experts_weights_do_not_matter(name: str) -> None:
    model = tiny_model(name)
    before = logits(model)
    removed = all_lose(model, 0)
    adapter = attach_remaining(model, removed)
    live = logits(model)
    assert not torch.allclose(live, before, atol=1e-5)
    (smaller, *_) = with_fewer(model, "experts", adapter.remaining)
    stock = smaller.build()
    for site in adapter_sites(adapter):
        for parameter in site.module.parameters():
            parameter.data[0] = float("nan")
    assert same_bits(logits(model), live)
    assert torch.allclose(logits(stock), live, atol=1e-5)


def adapter_sites(adapter: RemainingExperts) -> list[Any]:
    return sites_of(adapter.anatomy, ["experts"])


# --- an adapter like the others ------------------------------------------------------------------


def test_detached_or_disabled_the_model_is_as_before() -> None:
    model = tiny_model("mixtral")
    before, keys = logits(model), list(model.state_dict())
    adapter = attach_remaining(model, all_lose(model, 3))
    assert list(model.state_dict()) == keys
    assert not torch.equal(logits(model), before)
    with adapter.disabled():
        assert same_bits(logits(model), before)
    adapter.detach()
    assert same_bits(logits(model), before)


def test_saved_and_loaded_it_closes_the_same(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    adapter = attach_remaining(model, all_lose(model, 3, 1))
    live = logits(model)
    adapter.save_pretrained(tmp_path)
    adapter.detach()
    again = RemainingExperts.from_pretrained(model, tmp_path)
    assert same_bits(logits(model), live)
    again.detach()


def test_a_deep_copy_is_a_model_of_its_own() -> None:
    model = tiny_model("mixtral")
    attach_remaining(model, all_lose(model, 1))
    live = logits(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert same_bits(logits(twin), live)


def test_gradients_reach_the_remaining_rows_of_the_router() -> None:
    model = tiny_model("mixtral")
    attach_remaining(model, all_lose(model, 1))
    model(input_ids=IDS, labels=IDS).loss.backward()
    gradient = model.model.layers[0].mlp.gate.weight.grad
    assert not gradient[1].any()
    assert gradient[[0, 2, 3]].any(dim=1).all()


def test_gates_act_on_the_experts_by_their_old_numbers() -> None:
    model = tiny_model("mixtral")
    attach_remaining(model, all_lose(model, 1))
    live = logits(model)
    gates = attach(model, GateConfig(("experts",)))
    with torch.no_grad():
        for gate in gates.parameters():
            gate[1] = 0
        assert same_bits(logits(model), live)
        gates["experts", 0][2] = 0
        assert not torch.allclose(logits(model), live, atol=1e-5)


def test_hooks_on_a_router_still_run() -> None:
    model = tiny_model("mixtral")
    seen: list[int] = []
    attach_remaining(model, all_lose(model, 1))
    router = model.model.layers[0].mlp.gate
    router.register_forward_hook(lambda m, args, output: seen.append(output[0].shape[-1]))
    logits(model)
    assert seen == [3]


def test_it_generates_with_the_cache() -> None:
    model = tiny_model("mixtral")
    attach_remaining(model, all_lose(model, 1))
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    cached, without = (model.generate(IDS, use_cache=c, **options) for c in (True, False))
    assert torch.equal(cached, without)


def test_it_compiles_to_one_graph() -> None:
    model: Any = tiny_model("mixtral")
    model.set_experts_implementation("grouped_mm")
    attach_remaining(model, all_lose(model, 1))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.allclose(logits(compiled), logits(model), atol=1e-6)


# --- export --------------------------------------------------------------------------------------


def test_the_exported_model_equals_the_live_one(tmp_path: Path) -> None:
    model = grouped()
    attach_remaining(model, all_lose(model, 2, 5))
    gates = attach(model, GateConfig(("experts",)))
    with torch.no_grad():
        for gate in gates.parameters():
            gate[[2, 5]] = 0
    result = export(model, tmp_path / "smaller")
    counts = {site.key: 6 for site in gates.sites}
    assert result.removed == {"experts": 2 * len(counts)}
    assert result.parameters == parameters_with(model, "experts", counts)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "smaller")
    assert again.config.n_routed_experts == 6
    assert torch.allclose(logits(again), logits(model), atol=1e-5)


def test_it_is_exported_without_gates(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    attach_remaining(model, all_lose(model, 0))
    result = export(model, tmp_path / "smaller")
    assert result.removed == {"experts": 4}
    assert result.difference < 1e-5


def test_experts_and_heads_leave_together(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    attach_remaining(model, all_lose(model, 0))
    prune(model, [{"input_ids": IDS}], PruneConfig(heads=0.5))
    result = export(model, tmp_path / "smaller")
    assert set(result.removed) == {"experts", "heads"}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "smaller")
    assert torch.allclose(logits(again), logits(model), atol=1e-5)


@pytest.mark.parametrize(("expert", "value"), [(2, 0.0), (3, 0.5)])
def test_a_gate_on_an_expert_that_is_still_chosen_is_refused(
    tmp_path: Path, expert: int, value: float
) -> None:
    model = tiny_model("mixtral")
    attach_remaining(model, all_lose(model, 1))
    gates = attach(model, GateConfig(("experts",)))
    with torch.no_grad():
        gates["experts", 1][expert] = value
    with pytest.raises(UnsupportedModel, match=rf"expert {expert} of layer 1 .*close_experts"):
        export(model, tmp_path / "smaller")
    assert not (tmp_path / "smaller").exists()


# --- what is refused -----------------------------------------------------------------------------


def test_every_token_needs_as_many_experts_as_before() -> None:
    model = tiny_model("mixtral")
    with pytest.raises(InvalidInput, match="would keep 1 of 4 experts, and each token goes to 2"):
        attach_remaining(model, all_lose(model, 0, 1, 3))
    assert "pliant" not in model._modules


def test_groups_of_different_sizes_are_refused() -> None:
    model = grouped()
    before = logits(model)
    with pytest.raises(UnsupportedModel, match="does not run with 7 experts in each layer"):
        attach_remaining(model, all_lose(model, 2))
    assert same_bits(logits(model), before)


def test_a_table_of_experts_is_refused() -> None:
    model = tiny_model("deepseek_v4")
    with pytest.raises(UnsupportedModel, match="looks experts up in a table, tid2eid"):
        attach_remaining(model, all_lose(model, 1))


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ({"0": (1, 1)}, "names an expert twice"),
        ({"0": (4,)}, "layer 0 has no expert 4: it has 0 to 3"),
        ({"9": (1,)}, "layer 9: name the experts"),
        ({"1": ()}, "no expert is named"),
    ],
)
def test_experts_that_do_not_exist(removed: dict[str, tuple[int, ...]], message: str) -> None:
    model = tiny_model("mixtral")
    whole = all_lose(model, *next(iter(removed.values()))) if "1" in removed else all_lose(model, 1)
    whole = {k: next(iter(removed.values())) for k in whole} if "9" not in removed else whole
    with pytest.raises(InvalidInput, match=message):
        attach_remaining(model, {**whole, **removed})


def test_layers_lose_as_many() -> None:
    model = tiny_model("mixtral")
    with pytest.raises(UnsupportedModel, match="layers lose different numbers of experts"):
        attach_remaining(model, {**all_lose(model, 1), "1": (0, 1)})
