"""An expert as a LoRA: the best of each rank, the best ranks of a budget, and the same logits."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests.experts.models import IDS, logits, with_experts
from tests.minimal_adapter import tiny_llama

from pliant.anatomy.tiny import tiny_model
from pliant.errors import InvalidInput, UnsupportedModel
from pliant.experts.lora import LoraResult, to_lora
from pliant.experts.model import svf_layers


def spectra(model: PeftModel) -> dict[str, tuple[torch.Tensor, int]]:
    """The energies of each weight's change by an SVD, and what a rank of it costs."""
    own = {}
    for path, layer in svf_layers(model.get_base_model()):
        delta = layer.get_delta_weight(model.active_adapter)
        *stack, rows, columns = delta.shape
        energies = torch.linalg.svdvals(delta).square()
        count = stack[0] if stack else 1
        name = getattr(layer, "parameter_name", None)
        total = energies.sum(0) if stack else energies
        own[path if name is None else f"{path}.{name}"] = (total, count * (rows + columns))
    return own


def kept(model: PeftModel, ranks: dict[str, int]) -> float:
    every = spectra(model)
    return sum(float(e[: ranks.get(name, 0)].sum()) for name, (e, _) in every.items()) / sum(
        float(e.sum()) for e, _ in every.values()
    )


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gpt_oss"])
def test_a_rank_keeps_what_an_svd_would_keep(name: str, tmp_path: Path) -> None:
    """On either side of the smaller one, transposed (Conv1D), and stacked in both orders."""
    model = with_experts("math", model=tiny_model(name))
    result = to_lora(model, tmp_path / "lora", rank=5)
    assert set(result.ranks.values()) <= set(range(1, 6)) and max(result.ranks.values()) == 5
    assert result.energy == pytest.approx(kept(model, result.ranks), rel=1e-4)
    assert 0 < result.logit_difference < result.effect and result.proof <= result.bound
    fresh = PeftModel.from_pretrained(tiny_model(name), tmp_path / "lora").eval()
    squares = 0.0
    for (_, ours), theirs in zip(
        svf_layers(model.get_base_model()), lora_layers(fresh), strict=True
    ):
        difference = ours.get_delta_weight("math") - theirs.get_delta_weight("default")
        squares += float(difference.square().sum())
    whole = sum(float(e.sum()) for e, _ in spectra(model).values())
    assert squares == pytest.approx((1 - result.energy) * whole, rel=1e-3)


def lora_layers(model: PeftModel) -> list[Any]:
    return [m for m in model.modules() if hasattr(m, "lora_A") and hasattr(m, "get_delta_weight")]


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)])
def test_all_ranks_are_the_expert(dtype: torch.dtype, rounding: float, tmp_path: Path) -> None:
    model = with_experts("math", "code", model=tiny_model("llama", dtype))
    ids = IDS % model.config.vocab_size
    result = to_lora(model, tmp_path / "lora", rank=1000, experts=["code"])
    assert result.energy == pytest.approx(1) and result.logit_difference <= rounding
    assert result.experts == ("code",)
    fresh = PeftModel.from_pretrained(tiny_model("llama", dtype), tmp_path / "lora").eval()
    model.set_adapter("code")
    expected = logits(model, ids)
    far = (logits(fresh, ids) - expected).abs().max() / expected.abs().max()
    assert far <= 10 * rounding


def test_a_budget_goes_where_it_keeps_most(tmp_path: Path) -> None:
    """Against every way to spend it, on weights of two sizes."""
    model = with_experts(
        "math", target_modules=["model.layers.0.self_attn.k_proj", "model.layers.1.mlp.up_proj"],
        rank=4,
    )  # fmt: skip
    every = spectra(model)
    costs = [cost for _, cost in every.values()]
    for steps in (1, 2, 4, 7):
        budget = steps * max(costs)
        result = to_lora(model, tmp_path / str(steps), budget=budget)
        spent = sum(result.ranks.get(name, 0) * cost for name, (_, cost) in every.items())
        assert spent == result.parameters <= budget
        best = max(
            kept(model, dict(zip(every, ranks, strict=True)))
            for ranks in product(range(5), repeat=2)
            if sum(r * c for r, c in zip(ranks, costs, strict=True)) <= result.parameters
        )
        assert result.energy == pytest.approx(best, rel=1e-5)


def test_a_budget_keeps_more_than_the_same_numbers_in_one_rank(tmp_path: Path) -> None:
    model = with_experts("math")
    with torch.no_grad():
        for i, (_, layer) in enumerate(svf_layers(model)):
            layer.changes()["math"].mul_(4.0 if i % 3 == 0 else 0.5)
    same = to_lora(model, tmp_path / "same", rank=2)
    best = to_lora(model, tmp_path / "best", budget=same.parameters)
    assert best.parameters <= same.parameters and best.energy > same.energy + 0.05
    assert len(set(best.ranks.values())) > 1
    more = to_lora(model, tmp_path / "more", budget=2 * same.parameters)
    assert more.energy > best.energy
    assert "keeps" in str(best) and "folder" not in best.as_dict()


def test_a_weight_of_a_mixture_may_be_left_out(tmp_path: Path) -> None:
    """PEFT nests the wrappers of those that stay."""
    model = with_experts("math", model=tiny_model("mixtral"), parts="mlp")
    with torch.no_grad():
        for _, layer in svf_layers(model):
            if layer.parameter_name == "gate_up_proj":
                layer.changes()["math"].mul_(0.01)
    result = to_lora(model, tmp_path / "lora", budget=30_000)
    assert {name.rpartition(".")[2] for name in result.ranks} == {"down_proj"}


def test_modules_are_named_as_usual_where_that_names_no_others(tmp_path: Path) -> None:
    from peft import PeftConfig

    to_lora(with_experts("math", parts="mlp"), tmp_path / "mlp", rank=2)
    config = PeftConfig.from_pretrained(tmp_path / "mlp")
    assert config.target_modules == {"up_proj", "gate_proj", "down_proj"}
    assert (config.r, config.lora_alpha, config.rank_pattern) == (2, 2, {})
    one = with_experts("math", target_modules=["q_proj"], layers_to_transform=[1])
    to_lora(one, tmp_path / "one", rank=2)
    config = PeftConfig.from_pretrained(tmp_path / "one")
    assert config.target_modules == {"model.layers.1.self_attn.q_proj"}
    assert b"pliant" not in (tmp_path / "one" / "adapter_config.json").read_bytes()


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({}, "give rank.*or budget"),
            ({"rank": 2, "budget": 100}, "give rank.*or budget"),
            ({"rank": 0}, "rank = 0: give a whole number, 1 or more"),
            ({"budget": 1.5}, "budget = 1.5: give a whole number"),
            ({"budget": 7}, "budget = 7: one rank of the smallest weight takes 24"),
        ],
    )
    def test_sizes(self, options: dict[str, Any], message: str, tmp_path: Path) -> None:
        with pytest.raises(InvalidInput, match=message):
            to_lora(with_experts("math"), tmp_path / "x", **options)
        assert not list(tmp_path.iterdir())

    def test_an_expert_that_changes_nothing(self, tmp_path: Path) -> None:
        model = with_experts("math")
        with torch.no_grad():
            for _, layer in svf_layers(model):
                layer.changes()["math"].zero_()
        with pytest.raises(InvalidInput, match="all z are 1"):
            to_lora(model, tmp_path / "x", rank=2)

    def test_what_peft_refuses_or_ignores_can_be_left_out(self, tmp_path: Path) -> None:
        """PEFT refuses Mamba's out_proj, and Mamba reads dt_proj's weight without calling it."""
        model = with_experts("math", model=tiny_model("mamba"))
        with pytest.raises(UnsupportedModel, match=r"no effect on dt_proj.*exclude=\['dt_proj'\]"):
            to_lora(model, tmp_path / "x", rank=2)
        with pytest.raises(UnsupportedModel, match="exclude.*'out_proj' is incompatible"):
            to_lora(model, tmp_path / "x", rank=2, exclude=["dt_proj"])
        assert not list(tmp_path.iterdir())
        result = to_lora(model, tmp_path / "x", rank=2, exclude=["out_proj", "dt_proj"])
        assert {name.rpartition(".")[2] for name in result.ranks} == {"in_proj", "x_proj"}
        assert result.energies["backbone.layers.0.mixer.out_proj"] == 0
        assert result.energy == pytest.approx(kept(model, result.ranks), rel=1e-4)

    @pytest.mark.parametrize(
        ("exclude", "message"),
        [(["up"], "'up': the expert changes no such module"), (["model"], "all that the expert")],
    )
    def test_what_is_left_out(self, exclude: list[str], message: str, tmp_path: Path) -> None:
        with pytest.raises(InvalidInput, match=message):
            to_lora(with_experts("math"), tmp_path / "x", rank=2, exclude=exclude)

    def test_a_folder_that_is_not_empty(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(InvalidInput, match="exists already"):
            to_lora(with_experts("math"), tmp_path, rank=2)


def test_its_sentence_says_what_is_lost(tmp_path: Path) -> None:
    base = tiny_llama().eval()
    base.name_or_path = "/home/somebody/llama"
    result: LoraResult = to_lora(with_experts("math", model=base), tmp_path / "x", rank=1)
    assert f"keeps {result.energy:.1%} of the energy of math" in str(result)
    assert f"{result.parameters:,} parameters (rank 1 in 14 weights)" in str(result)
    card = (tmp_path / "x" / "README.md").read_text()
    assert "library_name: peft" in card and f"{result.energy:.1%}" in card
    assert not [p for p in (tmp_path / "x").iterdir() if b"somebody" in p.read_bytes()]
