"""An expert as a value: its algebra, its file, and what cannot be combined."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load, save
from tests.experts.models import IDS, logits, set_z, with_experts
from tests.minimal_adapter import tiny_llama

from pliant.anatomy.tiny import tiny_model
from pliant.errors import AdapterError, CorruptFile, InvalidInput, UnsupportedModel, WrongBase
from pliant.experts.adapting.folders import base_of
from pliant.experts.expert import Expert
from pliant.experts.export import on_its_base
from pliant.experts.factors import singular_values
from pliant.experts.model import svf_layers
from pliant.loading import load_model

FILES = ("adapter_config.json", "adapter_model.safetensors")
BASE = "base_model_name_or_path"
MODEL = with_experts("math", "code")
MATH = Expert.of(MODEL, "math")
NUMBERS = st.floats(-2, 2, width=32)


@st.composite
def experts(draw: st.DrawFn) -> Expert:
    """An expert with other numbers, of which some matrices have none but 0."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    scales = draw(st.lists(st.sampled_from([0.0, 0.1, 1.0]), min_size=2, max_size=2))
    changes = {
        path: scales[i % 2] * torch.randn(d.shape, generator=generator)
        for i, (path, d) in enumerate(MATH.changes.items())
    }
    return Expert(changes, MATH.settings)


def near(a: Expert, b: Expert) -> bool:
    return a.distance(b) <= 1e-5 * (1 + a.norm() + b.norm())


def other_base() -> PeftModel:
    base = tiny_llama().eval()
    with torch.no_grad():
        base.lm_head.weight += 0.5
    return with_experts("math", model=base)


class TestAlgebra:
    @settings(max_examples=30)
    @given(experts(), experts(), experts(), NUMBERS, NUMBERS)
    def test_experts_are_vectors(self, x: Expert, y: Expert, z: Expert, a: float, b: float) -> None:
        assert x + y == y + x
        assert near((x + y) + z, x + (y + z))
        assert near(a * (x + y), a * x + a * y)
        assert near((a + b) * x, a * x + b * x)
        assert near(a * (b * x), (a * b) * x)
        assert 1.0 * x == x == x + 0 * y
        assert x - x == 0 * x
        assert x - y == x + -y
        assert sum([x, y]) == x + y
        assert near(2 * (x / 2), x)

    @settings(max_examples=30)
    @given(experts(), experts(), experts(), NUMBERS)
    def test_norms_are_norms(self, x: Expert, y: Expert, z: Expert, a: float) -> None:
        assert (a * x).norm() == pytest.approx(abs(a) * x.norm(), rel=1e-5, abs=1e-6)
        assert (x + y).norm() <= (x.norm() + y.norm()) * (1 + 1e-6)
        assert x.distance(z) <= (x.distance(y) + y.distance(z)) * (1 + 1e-6)
        assert x.distance(y) == y.distance(x)
        assert -1 - 1e-6 <= x.cosine(y) <= 1 + 1e-6
        assert (x.norm() == 0) == (x == 0 * x)

    def test_a_norm_is_that_of_all_numbers(self) -> None:
        every = torch.cat([d.flatten() for d in MATH.changes.values()])
        assert MATH.norm() == pytest.approx(float(every.norm()), rel=1e-6)
        assert MATH.cosine(MATH) == pytest.approx(1)
        assert MATH.cosine(-2 * MATH) == pytest.approx(-1)
        assert MATH.cosine(0 * MATH) == 0

    def test_with_singular_values_a_norm_is_that_of_the_changed_weights(self) -> None:
        scales = singular_values(MODEL)
        squares = [
            float(layer.get_delta_weight("math").square().sum()) for _, layer in svf_layers(MODEL)
        ]
        assert MATH.norm(scales) == pytest.approx(sum(squares) ** 0.5, rel=1e-5)
        code = Expert.of(MODEL, "code")
        differences = [
            float((layer.get_delta_weight("math") - layer.get_delta_weight("code")).square().sum())
            for _, layer in svf_layers(MODEL)
        ]
        assert MATH.distance(code, scales) == pytest.approx(sum(differences) ** 0.5, rel=1e-5)

    def test_a_sum_acts_as_peft_mixes(self) -> None:
        model = with_experts("math", "code")
        model.base_model.add_weighted_adapter(["math", "code"], [1.0, 0.5], "both")
        assert Expert.of(model, "math") + 0.5 * Expert.of(model, "code") == Expert.of(model, "both")

    def test_numbers_of_numpy_are_numbers(self) -> None:
        assert np.float64(0.5) * MATH == MATH * np.float32(0.5) == MATH / 2

    def test_nothing_else_can_be_added_or_multiplied(self) -> None:
        for wrong in (1, "code", None, [MATH]):
            with pytest.raises(TypeError):
                MATH + wrong  # type: ignore[operator]
        for wrong in ("2", None, MATH, True):
            with pytest.raises(TypeError):
                MATH * wrong  # type: ignore[operator]
        for wrong in (float("nan"), float("inf")):
            with pytest.raises(InvalidInput, match="finite"):
                wrong * MATH
        with pytest.raises(InvalidInput, match="divided by 0"):
            MATH / 0

    def test_an_operation_leaves_its_experts_alone(self) -> None:
        before = {path: d.clone() for path, d in MATH.changes.items()}
        (MATH + MATH) * 3 - MATH
        assert all(torch.equal(before[path], d) for path, d in MATH.changes.items())
        set_z(model := with_experts("math"), "math", 5)
        value = Expert.of(model, "math")
        set_z(model, "math", 6)
        assert value != Expert.of(model, "math")


class TestOtherMatrices:
    def test_experts_of_other_matrices_add_up(self) -> None:
        """One of the MLPs plus one of attention is one of both."""
        base = tiny_llama().eval()
        mlp = Expert.of(with_experts("x", model=base, parts="mlp"), "x")
        attention = Expert.of(with_experts("x", model=tiny_llama().eval(), parts="attention"), "x")
        both = mlp + attention
        assert both.numbers == mlp.numbers + attention.numbers
        assert both - attention == mlp
        assert mlp.cosine(attention) == 0
        model = both.apply(tiny_llama().eval(), "both")
        assert Expert.of(model, "both") == both
        mixed = with_experts("mlp", model=tiny_llama().eval(), parts="mlp")
        attention.apply(mixed, "attention")
        mixed.base_model.add_weighted_adapter(["mlp", "attention"], [1.0, 1.0], "both")
        mlp.apply(mixed, "mlp")
        mixed.set_adapter("both")
        assert Expert.of(mixed, "both") == both

    def test_an_expert_of_fewer_singular_values_adds_to_the_first(self) -> None:
        few = Expert.of(with_experts("x", rank=3), "x")
        total = few + MATH
        assert total - MATH != 0 * MATH and total.numbers == MATH.numbers
        path = next(iter(few.changes))
        assert torch.equal(total.changes[path][3:], MATH.changes[path][3:])
        assert total.settings["rank"] is None
        assert Expert.of(total.apply(tiny_llama().eval()), "default") == total

    def test_approximated_vectors_of_another_rank_are_refused(self) -> None:
        with pytest.warns(UserWarning, match="too large to decompose exactly"):
            few, more = (
                Expert.of(with_experts("x", rank=rank, exact_limit=4), "x") for rank in (2, 3)
            )
        assert few + few == 2 * few
        with pytest.raises(InvalidInput, match="approximated.*exact_limit = 4"):
            few + more

    def test_another_base_is_refused(self) -> None:
        foreign = Expert.of(other_base(), "math")
        for operation in (lambda: MATH + foreign, lambda: MATH.cosine(foreign)):
            with pytest.raises(WrongBase, match="different bases: the values of"):
                operation()
        assert foreign != MATH and MATH != "math"

    def test_other_singular_vectors_are_refused(self) -> None:
        """A base in bf16 has the same fingerprint."""
        half = Expert.of(with_experts("math", model=tiny_llama().to(torch.bfloat16).eval()), "math")
        checks = {path: value + 0.5 for path, value in half.settings["checks"].items()}
        turned = Expert(half.changes, {**half.settings, "checks": checks})
        with pytest.raises(WrongBase, match="singular vectors"):
            MATH + turned

    def test_stacked_weights_that_one_has_alone_are_refused(self) -> None:
        whole = with_experts("x", model=tiny_model("mixtral"))
        every = whole.peft_config["x"].target_parameters
        some = with_experts(
            "x",
            model=tiny_model("mixtral"),
            target_modules=[],
            target_parameters=[n for n in every if n.endswith("down_proj")],
        )
        value = Expert.of(whole, "x")
        assert value + value == 2 * value
        with pytest.raises(InvalidInput, match="only one of the experts adapts the stacked weight"):
            value + Expert.of(some, "x")


class TestFiles:
    @pytest.mark.parametrize("kind", ["llama", "mixtral", "albert_shared"])
    def test_the_files_are_those_of_peft(self, kind: str, tmp_path: Path) -> None:
        base = tiny_llama().eval() if kind == "llama" else None
        if kind == "mixtral":
            base = tiny_model("mixtral")
        if kind == "albert_shared":
            base = tiny_llama().eval()
            base.model.layers[1] = base.model.layers[0]
        model = with_experts("default", model=base, rank=5, parts="mlp")
        model.save_pretrained(tmp_path / "peft")
        Expert.of(model).save(tmp_path / "taken")
        Expert.load(tmp_path / "peft").save(tmp_path / "loaded")
        for name in FILES:
            bytes_ = (tmp_path / "peft" / name).read_bytes()
            assert (tmp_path / "loaded" / name).read_bytes() == bytes_
        config, weights = (tmp_path / "taken" / name for name in FILES)
        assert weights.read_bytes() == (tmp_path / "peft" / FILES[1]).read_bytes()
        assert settings_in(config) == settings_in(tmp_path / "peft" / FILES[0])

    def test_the_base_is_named_only_if_anybody_can_load_it(self, tmp_path: Path) -> None:
        """A path says who trained the expert, and where."""
        for place, name in (("/home/somebody/llama", None), ("somebody/llama", "somebody/llama")):
            model = with_experts("math")
            model.peft_config["math"].base_model_name_or_path = place
            model.save_pretrained(tmp_path / "peft")
            Expert.of(model, "math").save(tmp_path / "taken")
            Expert(MATH.changes, {**MATH.settings, BASE: place}).save(tmp_path / "old")
            for folder in ("peft/math", "taken", "old"):
                assert json.loads((tmp_path / folder / FILES[0]).read_text())[BASE] == name

    @pytest.mark.parametrize("how", ["peft", "expert"])
    def test_a_base_in_a_folder_is_remembered_on_this_machine_alone(
        self, how: str, tmp_path: Path
    ) -> None:
        tiny_llama(seed=7).save_pretrained(tmp_path / "base")
        model = with_experts("math", model=load_model(tmp_path / "base"))
        folder = tmp_path / ("peft/math" if how == "peft" else "value")
        if how == "peft":
            model.save_pretrained(tmp_path / "peft")
        else:
            Expert.of(model, "math").save(folder)
        for path in folder.rglob("*"):
            assert str(tmp_path).encode() not in path.read_bytes(), "it may be shared"
        expert = Expert.load(folder)
        assert expert.base_name == ""
        on_base, _ = on_its_base(expert)
        assert torch.allclose(logits(on_base), logits(model), atol=1e-6)
        assert base_of({"math": folder}) == str(tmp_path / "base")
        (tmp_path / "base").rename(tmp_path / "moved")
        with pytest.raises(InvalidInput, match="does not name its base"):
            base_of({"math": folder})

    def test_peft_loads_what_was_saved(self, tmp_path: Path) -> None:
        value = MATH + 0.5 * Expert.of(MODEL, "code")
        value.save(tmp_path / "both")
        loaded = PeftModel.from_pretrained(tiny_llama().eval(), tmp_path / "both").eval()
        MODEL.base_model.add_weighted_adapter(["math", "code"], [1.0, 0.5], "both")
        MODEL.set_adapter("both")
        try:
            assert torch.allclose(logits(loaded), logits(MODEL), atol=1e-5)
        finally:
            MODEL.delete_adapter("both")
            MODEL.set_adapter("math")

    def test_saving_again_replaces(self, tmp_path: Path) -> None:
        MATH.save(tmp_path / "x")
        (2 * MATH).save(tmp_path / "x")
        assert Expert.load(tmp_path / "x") == 2 * MATH

    def test_what_is_no_expert_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(AdapterError, match="no such folder"):
            Expert.load(tmp_path / "nowhere")
        MATH.save(tmp_path / "run" / "math")
        with pytest.raises(AdapterError, match="holds no expert.*in it: math"):
            Expert.load(tmp_path / "run")
        lora = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
        lora.save_pretrained(tmp_path / "lora")
        with pytest.raises(InvalidInput, match="holds a LORA adapter"):
            Expert.load(tmp_path / "lora")
        (tmp_path / "file").write_text("")
        with pytest.raises(InvalidInput, match="is a file"):
            MATH.save(tmp_path / "file")

    @pytest.mark.parametrize(
        ("name", "change", "message"),
        [
            (FILES[0], lambda b: b[:50], "no configuration of PEFT"),
            (FILES[0], lambda b: b"[]", "no configuration of PEFT"),
            (FILES[0], lambda b: b.replace(b'"grid"', b'"grit"'), "no configuration of PEFT"),
            (FILES[0], lambda b: b"[" * 100_000, "no configuration of PEFT"),
            (FILES[0], lambda b: b.replace(b'"rank": null', b'"rank": "3"'), r"PEFT \(rank"),
            (FILES[0], lambda b: b.replace(b'"rank": null', b'"rank": 0'), r"PEFT \(rank = 0"),
            (FILES[0], lambda b: b.replace(b'"checks": {', b'"checks": {"x": "y",'), "checks.x"),
            (FILES[0], lambda b: b.replace(b'"shapes": {', b'"shapes": {"x": [],'), "shapes.x"),
            (FILES[0], lambda b: with_setting(b, target_modules="(["), "no regular expression"),
            (FILES[0], lambda b: with_setting(b, task_type="POEM"), "Invalid task type"),
            (FILES[1], lambda b: b[:-8], "truncated or damaged"),
            (FILES[1], lambda b: as_dtype(b, torch.int32), "is no z of an expert"),
            (FILES[1], lambda b: as_dtype(b, torch.float64, 1e300), "NaN or infinity"),
            (FILES[1], lambda b: b[:-4] + b"\x00\x00\xc0\x7f", "NaN or infinity"),
            (FILES[1], lambda b: b.replace(b"svf_z", b"svd_z"), "is no z of an expert"),
            (FILES[1], None, "missing"),
        ],
    )
    def test_damage_is_reported(self, name: str, change: Any, message: str, tmp_path: Path) -> None:
        MATH.save(tmp_path)
        path = tmp_path / name
        if change is None:
            path.unlink()
        else:
            path.write_bytes(change(path.read_bytes()))
        with pytest.raises(CorruptFile, match=message):
            Expert.load(tmp_path)

    def test_peft_loads_no_diverged_expert_either(self, tmp_path: Path) -> None:
        MATH.save(tmp_path)
        path = tmp_path / FILES[1]
        path.write_bytes(path.read_bytes()[:-4] + b"\x00\x00\x80\x7f")
        with pytest.raises(CorruptFile, match="NaN or infinity"):
            PeftModel.from_pretrained(tiny_llama().eval(), str(tmp_path))

    def test_modules_trained_as_a_whole_are_refused(self) -> None:
        model = with_experts("math", modules_to_save=["lm_head"])
        with pytest.raises(UnsupportedModel, match="trained as a whole"):
            Expert.of(model, "math")


class TestOnAModel:
    @pytest.mark.parametrize("kind", ["gpt2", "mixtral"])
    def test_taken_from_one_model_and_put_on_another(self, kind: str) -> None:
        first = with_experts("math", model=tiny_model(kind))
        value = Expert.of(first, "math")
        second = value.apply(tiny_model(kind), "sums")
        assert Expert.of(second, "sums") == value
        ids = IDS % second.config.vocab_size
        assert torch.allclose(logits(first.eval(), ids), logits(second, ids), atol=1e-5)
        assert not any(p.requires_grad for p in second.parameters())
        assert not second.training

    def test_beside_others_and_in_place_of_one(self) -> None:
        model = with_experts("math")
        (2 * MATH).apply(model, "twice")
        model.set_adapter("twice")
        doubled = logits(model)
        model.set_adapter("math")
        assert not torch.equal(logits(model), doubled)
        (2 * MATH).apply(model, "math")
        assert torch.allclose(logits(model), doubled, atol=1e-5)
        assert sorted(model.peft_config) == ["math", "twice"]

    def test_trainable(self) -> None:
        model = MATH.apply(tiny_llama().eval(), trainable=True)
        assert {n.split(".")[-3] for n, p in model.named_parameters() if p.requires_grad} == {
            "svf_z"
        }

    def test_an_expert_of_other_matrices_is_not_replaced(self) -> None:
        model = with_experts("math", parts="mlp")
        with pytest.raises(InvalidInput, match="another expert 'math', of other matrices"):
            MATH.apply(model, "math")

    def test_another_base_is_refused(self) -> None:
        model = tiny_llama().eval()
        with torch.no_grad():
            model.lm_head.weight += 0.5
        before = logits(model)
        with pytest.raises(WrongBase):
            MATH.apply(model)
        assert torch.equal(logits(model), before)

    @pytest.mark.parametrize("others", [False, True], ids=["alone", "beside-another"])
    @pytest.mark.parametrize(
        ("change", "error"),
        [
            ({"checks": dict.fromkeys(MATH.changes, 9.0)}, WrongBase),
            ({"checks": dict.fromkeys(MATH.changes, float("nan"))}, WrongBase),
            ({"checks": dict.fromkeys(MATH.changes, float("inf"))}, WrongBase),
            ({"rank": 3}, AdapterError),
            ({"target_modules": ["q_proj"]}, AdapterError),
            ({"target_modules": ["nonesuch"]}, AdapterError),
            ({"target_modules": ["q_proj", "input_layernorm"]}, UnsupportedModel),
        ],
        ids=["vectors", "nan", "inf", "numbers", "fewer", "none", "norm"],
    )
    def test_one_that_does_not_fit_leaves_the_model_as_it_was(
        self, change: dict[str, Any], error: type[Exception], others: bool
    ) -> None:
        model = with_experts("code") if others else tiny_llama().eval()
        before, output = state_of(model), logits(model)
        with pytest.raises(error):
            Expert(MATH.changes, {**MATH.settings, **change}).apply(model, "math")
        assert state_of(model) == before
        assert torch.equal(logits(model), output)

    @pytest.mark.parametrize("name", ["double", "a.b", ""])
    def test_names_that_torch_cannot_give_are_refused(self, name: str) -> None:
        with pytest.raises(InvalidInput, match="cannot be the name of an expert"):
            MATH.apply(with_experts("math"), name)

    def test_an_unknown_name_is_refused(self) -> None:
        with pytest.raises(InvalidInput, match="no expert 'maths'; did you mean 'math'"):
            Expert.of(MODEL, "maths")
        lora = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
        with pytest.raises(InvalidInput, match="LoraConfig"):
            Expert.of(lora)

    def test_transformers_own_adapters_are_experts_too(self, tmp_path: Path) -> None:
        MATH.save(tmp_path)
        base = tiny_llama().eval()
        base.load_adapter(str(tmp_path), adapter_name="math")
        assert Expert.of(base, "math") == MATH


def settings_in(path: Path) -> dict[str, Any]:
    """The settings; PEFT writes sets, so the order of a list in them says nothing."""
    content = json.loads(path.read_text())
    return {k: sorted(v) if isinstance(v, list) else v for k, v in content.items()}


def with_setting(content: bytes, **changes: Any) -> bytes:
    return json.dumps({**json.loads(content), **changes}).encode()


def as_dtype(content: bytes, dtype: torch.dtype, factor: float = 1) -> bytes:
    """A file of weights with other numbers."""
    return save({name: (factor * t.to(dtype)).to(dtype) for name, t in load(content).items()})


def state_of(model: torch.nn.Module) -> list[Any]:
    """Its modules, what of it is trained, and its experts."""
    kinds = [(path, type(module)) for path, module in model.named_modules()]
    trained = [(path, p.requires_grad) for path, p in model.named_parameters()]
    return [kinds, trained, model.training, sorted(getattr(model, "peft_config", ()))]
