"""Experts as a method of PEFT: added, chosen, mixed, merged, saved, and one for each row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from tests.experts.models import IDS, logits, set_z, with_experts
from tests.minimal_adapter import tiny_llama
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from pliant.anatomy.tiny import tiny_model
from pliant.errors import AdapterError, InvalidInput, UnsupportedModel, WrongBase
from pliant.experts import BASE, Rows, SVFConfig, use_rows
from pliant.experts.model import svf_layers

NAMES = ("math", "code", "law")


class TestConfig:
    def test_peft_knows_the_method(self, tmp_path: Path) -> None:
        SVFConfig(rank=3, parts="mlp").save_pretrained(tmp_path)
        config = PeftConfig.from_pretrained(tmp_path)
        assert isinstance(config, SVFConfig)
        assert (config.rank, config.parts, config.peft_type.value) == (3, "mlp", "SVF")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"parts": "heads"}, "parts = 'heads'.*all, mlp, attention"),
            ({"form": "fast"}, "form = 'fast'"),
            ({"rank": 0}, "rank = 0: give a whole number, 1 or more"),
            ({"exact_limit": 0}, "exact_limit = 0"),
            ({"layers_to_transform": -1}, "count from 0"),
        ],
    )
    def test_bad_values_are_refused(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(InvalidInput, match=message):
            SVFConfig(**options)

    @pytest.mark.parametrize(("parts", "per_layer"), [("all", 7), ("mlp", 3), ("attention", 4)])
    def test_parts_choose_the_projections(self, parts: Any, per_layer: int) -> None:
        model = with_experts("one", parts=parts)
        layers = model.config.num_hidden_layers
        assert len(list(svf_layers(model))) == layers * per_layer

    def test_targets_are_named_as_in_peft(self) -> None:
        model = with_experts("one", target_modules=["q_proj"], layers_to_transform=[1])
        assert [path for path, _ in svf_layers(model)] == [
            "base_model.model.model.layers.1.self_attn.q_proj"
        ]

    def test_what_is_no_projection_is_refused(self) -> None:
        with pytest.raises(UnsupportedModel, match="embed_tokens is a Embedding"):
            with_experts("one", target_modules=["embed_tokens"])

    def test_an_approximate_basis_says_what_it_leaves_out(self) -> None:
        with pytest.warns(UserWarning, match=r"14 matrices are too large .* up to \d+\.\d%"):
            model = with_experts("one", rank=2, exact_limit=4)
        missing = [layer.missing for _, layer in svf_layers(model)]
        assert all(0 < each < 1 for each in missing)

    def test_a_rank_leaves_the_small_singular_values(self) -> None:
        model = with_experts("one", rank=5)
        for _, layer in svf_layers(model):
            assert layer.changes()["one"].shape == (5,)
            change = layer.get_delta_weight("one")
            assert torch.linalg.matrix_rank(change, tol=1e-5) == 5


class TestSeveral:
    def test_each_is_chosen_by_name_and_the_first_is_active(self) -> None:
        model = with_experts(*NAMES)
        each = {}
        for name in NAMES:
            model.set_adapter(name)
            each[name] = logits(model)
        assert not torch.equal(each["math"], each["code"])
        assert torch.equal(logits(with_experts("math")), each["math"])

    def test_a_basis_serves_all(self) -> None:
        one, three = with_experts("math"), with_experts(*NAMES)
        count = [sum("svf_basis" in n for n, _ in m.named_parameters()) for m in (one, three)]
        assert count[0] == count[1]

    def test_a_mixture_is_a_sum_of_changes(self) -> None:
        model = with_experts(*NAMES)
        model.add_weighted_adapter(["math", "code"], [0.5, -2.0], "mixed")
        for _, layer in svf_layers(model):
            d = layer.changes()
            assert torch.allclose(d["mixed"], 0.5 * d["math"] - 2 * d["code"], atol=1e-6)
        model.add_weighted_adapter(["math"], [0.0], "nothing")
        model.set_adapter("nothing")
        with model.disable_adapter():
            plain = logits(model)
        assert torch.equal(logits(model), plain)

    def test_a_mixture_covers_the_layers_of_both(self) -> None:
        model = with_experts("math", target_modules=["q_proj"], layers_to_transform=[0])
        config = SVFConfig(target_modules=["q_proj"], layers_to_transform=[1])
        model.add_adapter("code", config)
        set_z(model, "math", 0), set_z(model, "code", 1)
        model.add_weighted_adapter(["math", "code"], [1.0, 1.0], "mixed")
        assert [bool(layer.changes()["mixed"].any()) for _, layer in svf_layers(model)] == [
            True
        ] * 2

    @pytest.mark.parametrize("name", ["double", "a.b"])
    def test_a_name_that_torch_uses_is_refused(self, name: str) -> None:
        with pytest.raises(InvalidInput, match="cannot be the name of an expert"):
            with_experts("math").add_adapter(name, SVFConfig())

    def test_two_active_experts_add_up(self) -> None:
        model = with_experts(*NAMES)
        model.add_weighted_adapter(["math", "code"], [1.0, 1.0], "mixed")
        model.set_adapter("mixed")
        mixed = logits(model)
        model.base_model.set_adapter(["math", "code"])
        assert torch.allclose(logits(model), mixed, atol=1e-5)

    def test_a_deleted_expert_is_gone(self) -> None:
        model = with_experts(*NAMES)
        model.delete_adapter("code")
        assert set(model.peft_config) == {"math", "law"}
        assert all("code" not in layer.changes() for _, layer in svf_layers(model))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((["math", "cod"], [1, 1], "new"), "no expert 'cod'; did you mean 'code'"),
            ((["math"], [1, 1], "new"), "1 experts and 2 weights"),
            ((["math"], [1], "code"), "there is an expert 'code' already"),
            ((["math"], [1], "new", "svd"), "combination_type = 'svd'"),
        ],
    )
    def test_bad_mixtures_are_refused(self, arguments: Any, message: str) -> None:
        with pytest.raises(InvalidInput, match=message):
            with_experts(*NAMES).add_weighted_adapter(*arguments)


class TestRows:
    def test_each_row_has_its_expert(self) -> None:
        model = with_experts(*NAMES)
        alone = []
        for row, name in enumerate(("code", "math")):
            model.set_adapter(name)
            alone.append(logits(model)[row])
        with model.disable_adapter():
            alone.append(logits(model)[2])
        rows = logits(model, adapter_names=["code", "math", BASE])
        assert torch.allclose(rows, torch.stack(alone), atol=1e-5)
        assert torch.equal(rows[2], alone[2])

    def test_each_row_has_its_mixture(self) -> None:
        model = with_experts(*NAMES)
        model.add_weighted_adapter(["math", "law"], [0.3, 0.7], "mixed")
        with model.base_model.rows([{"math": 0.3, "law": 0.7}, {}, {"code": 1.0}]):
            rows = logits(model)
        model.set_adapter("mixed")
        assert torch.allclose(rows[0], logits(model)[0], atol=1e-5)

    def test_a_mixture_may_have_a_coefficient_for_each_layer(self) -> None:
        model = with_experts(*NAMES)
        depth = model.config.num_hidden_layers
        law = [float(i) for i in range(depth)]
        with model.base_model.rows([{"math": 0.5, "law": law}, {}, {"code": 1.0}]):
            rows = logits(model)
        model.add_weighted_adapter(["math"], [0.5], "mixed")
        with torch.no_grad():
            for _, layer in svf_layers(model):
                d = layer.changes()
                d["mixed"] += law[layer.layer_index] * d["law"]
        model.set_adapter("mixed")
        assert torch.allclose(rows[0], logits(model)[0], atol=1e-5)
        with pytest.raises(InvalidInput, match="coefficients for \\[2, 3\\] layers"):
            Rows.of_mixtures([{"math": [1.0, 2.0], "law": [1.0, 2.0, 3.0]}], NAMES)

    @pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"num_return_sequences": 2}])
    def test_generation_is_as_one_at_a_time(self, options: dict[str, Any]) -> None:
        model = with_experts("math", "code")
        beams = {"num_beams": 2} if options else {}
        settings = {**beams, **options, "max_new_tokens": 6, "do_sample": False}
        names = ["code", BASE, "math"]
        rows = model.generate(input_ids=IDS, adapter_names=names, **settings)
        copies = settings.get("num_return_sequences", 1)
        for i, name in enumerate(names):
            one = model.generate(input_ids=IDS[i : i + 1], adapter_names=[name], **settings)
            assert torch.equal(rows[i * copies : (i + 1) * copies, : one.shape[1]], one)

    def test_a_batch_may_hold_copies_of_the_rows_or_none(self) -> None:
        model = with_experts(*NAMES)
        with model.base_model.rows([{"math": 1.0}, {"code": 1.0}, {}]):
            one, copies = logits(model), logits(model, IDS.repeat_interleave(2, 0))
            assert torch.allclose(logits(model), one)
        assert torch.allclose(copies, one.repeat_interleave(2, 0), atol=1e-5)

    def test_rows_are_for_inference(self) -> None:
        model = with_experts(*NAMES).train()
        with pytest.raises(ValueError, match="training mode"):
            logits(model, adapter_names=["math", "code", BASE])

    def test_rows_must_fit(self) -> None:
        model = with_experts(*NAMES)
        with pytest.raises(InvalidInput, match="experts for 2 rows, and the batch has 3"):
            logits(model, adapter_names=["math", "code"])
        with pytest.raises(InvalidInput, match="no expert 'maths'; did you mean 'math'"):
            logits(model, adapter_names=["maths", "code", BASE])
        with pytest.raises(InvalidInput, match="there are no rows"), model.base_model.rows([]):
            pass
        assert torch.equal(logits(model), logits(with_experts("math")))


class TestForms:
    def test_training_folds_and_inference_does_not(self) -> None:
        model = with_experts("math")
        layer: Any = next(layer for _, layer in svf_layers(model))
        assert layer.folds(layer.change_of(["math"]))
        model.requires_grad_(False)
        assert not layer.folds(layer.change_of(["math"]))

    def test_few_singular_values_are_not_folded_unless_by_hand(self) -> None:
        """With few, the delta form trains faster."""
        for form, folds in (("auto", False), ("folded", True)):
            model = with_experts("math", rank=1, form=form)
            layer: Any = next(layer for _, layer in svf_layers(model))
            assert layer.folds(layer.change_of(["math"])) == folds

    def test_the_folded_weight_follows_every_change_of_z(self) -> None:
        model = with_experts("math", form="folded")
        logits(model)
        for change in (lambda p: p.mul_(2), lambda p: p.data.mul_(2)):  # some optimizers use .data
            with torch.no_grad():
                for _, layer in svf_layers(model):
                    change(layer.changes()["math"])
            after = logits(model)
            for _, layer in svf_layers(model):
                layer.form = "delta"
            assert torch.allclose(after, logits(model), atol=1e-5)
            for _, layer in svf_layers(model):
                layer.form = "folded"

    def test_a_singular_value_that_is_removed_has_a_gradient(self) -> None:
        """1 + d = 0: the folded form would divide by it."""
        model = with_experts("math", form="folded")
        with torch.no_grad():
            for _, layer in svf_layers(model):
                layer.changes()["math"][0] = -1
        model(input_ids=IDS, labels=IDS).loss.backward()
        for name, parameter in model.named_parameters():
            if "svf_z" in name:
                assert torch.isfinite(parameter.grad).all()
                assert parameter.grad[0] != 0

    @pytest.mark.parametrize("form", ["delta", "folded"])
    def test_gradient_checkpointing_changes_no_gradient(self, form: Any) -> None:
        gradients = []
        for checkpointing in (False, True):
            model = with_experts("math", form=form).train()
            if checkpointing:
                model.enable_input_require_grads()
                model.gradient_checkpointing_enable()
            model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
            gradients.append([p.grad for p in model.parameters() if p.requires_grad])
        for one, other in zip(*gradients, strict=True):
            assert torch.allclose(one, other, atol=1e-7)

    def test_compiled_without_a_break_it_sees_changes(self) -> None:
        model = with_experts("math").requires_grad_(False)
        compiled = torch.compile(model.base_model.model, backend="eager", fullgraph=True)
        assert torch.allclose(logits(compiled), logits(model), atol=1e-6)
        set_z(model, "math", seed=7)
        assert torch.allclose(logits(compiled), logits(model), atol=1e-6)


class TestMerging:
    def test_a_hundred_rounds_in_bf16_leave_no_drift(self) -> None:
        model = with_experts("math", model=tiny_llama().to(torch.bfloat16))
        layer: Any = next(layer for _, layer in svf_layers(model))
        before = layer.weight.clone()
        for _ in range(100):
            layer.merge()
            layer.unmerge()
        assert torch.equal(layer.weight, before)

    def test_merged_and_unloaded_it_is_the_stock_model(self) -> None:
        model = with_experts("math")
        expected = logits(model)
        kinds = [type(module) for module in tiny_llama().modules()]
        stock = model.merge_and_unload()
        assert [type(module) for module in stock.modules()] == kinds
        assert torch.allclose(logits(stock), expected, atol=1e-5)

    def test_disabled_while_merged_it_is_the_base(self) -> None:
        model = with_experts("math")
        with model.disable_adapter():
            plain = logits(model)
        model.merge_adapter()
        with model.disable_adapter():
            assert torch.equal(logits(model), plain)

    def test_several_merge_at_once(self) -> None:
        model = with_experts(*NAMES)
        model.base_model.set_adapter(["math", "code"])
        expected = logits(model)
        model.merge_adapter()
        assert torch.allclose(logits(model), expected, atol=1e-5)
        model.unmerge_adapter()
        assert torch.allclose(logits(model), expected, atol=1e-6)


class TestBases:
    @pytest.mark.parametrize("bits", [4, 8])
    def test_a_quantised_base_has_experts_that_train(self, bits: int, tmp_path: Path) -> None:
        tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
        how = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
        base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=how).eval()
        model = with_experts("math", model=base)
        acting = logits(model)
        with model.disable_adapter():
            assert not torch.allclose(logits(model), acting, atol=1e-3)
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
        assert all(p.grad is not None for n, p in model.named_parameters() if "svf_z" in n)
        with pytest.raises(AdapterError, match="quantised weight: load the base unquantised"):
            model.merge_adapter()

    def test_modules_that_share_a_weight_share_their_expert(self) -> None:
        base = tiny_llama().eval()
        first, second = (layer.self_attn for layer in base.model.layers[:2])
        second.q_proj.weight = first.q_proj.weight
        model = with_experts("math", model=base)
        expected = logits(model)
        model.merge_adapter()
        assert torch.allclose(logits(model), expected, atol=1e-5)
        model.unmerge_adapter()
        assert torch.allclose(logits(model), expected, atol=1e-6)

    def test_transformers_loads_it_without_a_wrapper(self, tmp_path: Path) -> None:
        model = with_experts("math")
        expected = logits(model)
        model.save_pretrained(tmp_path)
        base = tiny_llama().eval()
        base.load_adapter(str(tmp_path / "math"), adapter_name="own")
        assert torch.allclose(logits(base), expected, atol=1e-5)
        with use_rows(base, _rows_of(base)):
            assert torch.allclose(logits(base)[0], expected[0], atol=1e-5)
        base.disable_adapters()
        assert torch.equal(logits(base), logits(tiny_llama().eval()))

    def test_loading_gives_what_was_saved_beside_others(self, tmp_path: Path) -> None:
        model = with_experts(*NAMES)
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(tiny_llama().eval(), tmp_path / "code", "code")
        again.load_adapter(str(tmp_path / "law"), "law")
        for name in ("code", "law"):
            model.set_adapter(name)
            again.set_adapter(name)
            assert torch.allclose(logits(again), logits(model), atol=1e-5)

    def test_a_refused_expert_leaves_the_first_as_it_was(self, tmp_path: Path) -> None:
        other = tiny_llama().eval()
        with torch.no_grad():
            other.model.layers[0].mlp.down_proj.weight[0] += 1
        with_experts("law", model=other).save_pretrained(tmp_path)
        model = with_experts("math")
        before = logits(model)
        with pytest.raises(WrongBase):
            model.load_adapter(str(tmp_path / "law"), "law")
        assert set(model.peft_config) == {"math"}
        assert all(set(layer.changes()) == {"math"} for _, layer in svf_layers(model))
        assert torch.equal(logits(model), before)

    def test_a_mixtures_stacked_weights_train(self) -> None:
        torch.manual_seed(0)
        model = get_peft_model(tiny_model("mixtral").eval(), SVFConfig(parts="mlp"))
        stacked = [n for n, p in model.named_parameters() if p.requires_grad and p.dim() == 2]
        assert len(stacked) == 2 * model.config.num_hidden_layers
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        parameters = dict(model.named_parameters())
        assert all(parameters[name].grad.any() for name in stacked)


def _rows_of(model: Any) -> Any:
    return Rows.of_mixtures([{"own": 1.0}, {}, {}], list(model.peft_config))
