"""Experts leave as stock checkpoints: the same logits, and no trace of us."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests.experts.models import IDS, logits, set_z, with_experts
from tests.minimal_adapter import tiny_llama
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
)

from pliant.anatomy.tiny import tiny_model
from pliant.errors import InvalidInput, ModelNotFound, UnsupportedModel, WrongBase
from pliant.experts.expert import Expert
from pliant.experts.export import merge
from pliant.experts.lora import to_lora
from pliant.experts.model import svf_layers
from pliant.loading import load

PLAIN = """
import json, sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

stock, base, lora, ids = sys.argv[1:]
ids = torch.tensor(json.loads(ids))
model = AutoModelForCausalLM.from_pretrained(stock)
adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), lora)
with torch.no_grad():
    both = [m.eval()(input_ids=ids).logits.tolist() for m in (model, adapted)]
assert "pliant" not in sys.modules
print(json.dumps(both))
"""


def nano(tmp_path: Path) -> tuple[PeftModel, Any, Path]:
    """An expert of an embedded model, and its folder."""
    base, tokenizer = load("nano-s")
    model = with_experts("default", model=base)
    Expert.of(model).save(tmp_path / "math")
    return model, tokenizer, tmp_path / "math"


def trainable(model: Any) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("llama", torch.float32),
        ("llama", torch.bfloat16),
        ("gpt2", torch.float32),  # Conv1D
        ("mixtral", torch.float32),  # stacked weights
        ("mamba", torch.bfloat16),
        ("gemma3n_text", torch.float32),
        ("zamba2", torch.float32),  # layers that share weights
    ],
)
def test_the_copy_computes_the_same_and_has_no_trace(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = with_experts("math", "code", model=tiny_model(name, dtype))
    ids = IDS % model.config.vocab_size
    before, learning = logits(model, ids), trainable(model)
    result = merge(model, tmp_path / "stock")
    assert torch.equal(logits(model, ids), before) and trainable(model) == learning
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "stock", dtype="auto").eval()
    assert again.dtype == dtype and type(again) is type(model.get_base_model())
    far = (logits(again, ids) - before).abs().max() / before.abs().max()
    assert far <= result.bound and result.difference <= result.bound
    assert (result.experts, result.architecture) == (("math",), type(again).__name__)
    for path in (tmp_path / "stock").rglob("*"):
        content = path.read_bytes().lower()
        if path.suffix == ".safetensors":  # the names, and not the numbers
            content = content[: 8 + int.from_bytes(path.read_bytes()[:8], "little")]
        assert not any(word in content for word in (b"pliant", b"peft", b"svf", b"base_layer"))


def test_in_half_precision_a_live_model_is_compared_as_it_would_be_merged(tmp_path: Path) -> None:
    """An expert that is not trained adds its effect to each call, which rounds otherwise."""
    model = with_experts("math", model=tiny_model("llama", torch.bfloat16))
    model.requires_grad_(False)
    with torch.no_grad():  # a z of 0, which has no folded form
        next(svf_layers(model))[1].changes()["math"][0] = -1
    ids = IDS % model.config.vocab_size
    live = logits(model, ids)
    assert merge(model, tmp_path / "stock").difference == 0
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "stock", dtype="auto").eval()
    assert not torch.equal(logits(again, ids), live)
    assert torch.equal(logits(model, ids), live)


def test_several_experts_merge_as_their_sum(tmp_path: Path) -> None:
    model = with_experts("math", "code")
    result = merge(model, tmp_path / "both", experts=["math", "code"])
    assert result.experts == ("code", "math") and "code + math in 14 weights" in str(result)
    total = Expert.of(model, "math") + Expert.of(model, "code")
    expected = logits(total.apply(tiny_llama().eval()))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "both").eval()
    assert torch.allclose(logits(again), expected, atol=1e-5)
    assert model.active_adapters == ["math"]


def test_a_folder_leaves_with_all_that_belongs_to_its_base(tmp_path: Path) -> None:
    """The base that the expert names, its tokenizer and its settings; read without Pliant."""
    model, tokenizer, folder = nano(tmp_path)
    assert "nano-s" in str(Expert.load(folder))
    result = merge(folder, tmp_path / "stock")
    assert "folder" not in result.as_dict()
    again = AutoTokenizer.from_pretrained(tmp_path / "stock")
    chat = [{"role": "user", "content": "What is 3 + 4?"}]
    assert again.apply_chat_template(chat, tokenize=False) == tokenizer.apply_chat_template(
        chat, tokenize=False
    )
    ours, theirs = (
        GenerationConfig.from_pretrained(place).to_dict()
        for place in (tmp_path / "stock", model.get_base_model().name_or_path)
    )
    assert ours == theirs
    lora = to_lora(folder, tmp_path / "lora", rank=1000, base="nano-s")
    assert lora.logit_difference <= lora.bound
    outputs = in_a_fresh_process(
        tmp_path / "stock", model.get_base_model().name_or_path, tmp_path / "lora"
    )
    expected = logits(model)
    for output in outputs:
        assert torch.allclose(output, expected, atol=1e-3)


def in_a_fresh_process(*places: Any) -> list[torch.Tensor]:
    """The logits of the stock model, and of the LoRA on the base, computed without Pliant."""
    arguments = [*map(str, places), json.dumps(IDS.tolist())]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, *arguments], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return [torch.tensor(output) for output in json.loads(done.stdout)]


def test_modules_trained_as_a_whole_come_along(tmp_path: Path) -> None:
    model = with_experts("math", modules_to_save=["lm_head"])
    with torch.no_grad():
        model.lm_head.modules_to_save["math"].weight += 0.5
    expected = logits(model)
    merge(model, tmp_path / "stock")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "stock").eval()
    assert torch.allclose(logits(again), expected, atol=1e-5)


class TestRefusals:
    """Nothing is written, and the model is as it was."""

    def test_another_method(self, tmp_path: Path) -> None:
        lora = get_peft_model(tiny_llama().eval(), LoraConfig(target_modules=["q_proj"]))
        for model in (tiny_llama().eval(), lora):
            with pytest.raises(InvalidInput, match="no experts: put one on it first"):
                merge(model, tmp_path / "x")
        both = get_peft_model(
            with_experts("math", target_modules=["up_proj"]).get_base_model(),
            LoraConfig(target_modules=["q_proj"]),
            adapter_name="lora",
        )
        with pytest.raises(UnsupportedModel, match="q_proj has another method's adapter"):
            merge(both, tmp_path / "x")
        assert not list(tmp_path.iterdir())

    def test_experts_that_are_not_at_work(self, tmp_path: Path) -> None:
        model = with_experts("math")
        with pytest.raises(InvalidInput, match="no expert 'maths'; did you mean 'math'"):
            merge(model, tmp_path / "x", experts=["maths"])
        with pytest.raises(InvalidInput, match="no expert is active"):
            merge(model, tmp_path / "x", experts=[])
        with model.disable_adapter(), pytest.raises(InvalidInput, match="disabled"):
            merge(model, tmp_path / "x")
        model.merge_adapter()
        with pytest.raises(InvalidInput, match="unmerge them first"):
            merge(model, tmp_path / "x")
        assert not list(tmp_path.iterdir())

    def test_a_weight_that_another_module_needs(self, tmp_path: Path) -> None:
        base = tiny_llama().eval()
        base.lm_head.weight = base.model.embed_tokens.weight
        model = with_experts("math", model=base, target_modules=["lm_head"])
        with pytest.raises(UnsupportedModel, match="embed_tokens.weight is also the weight of"):
            merge(model, tmp_path / "x")

    def test_a_folder_that_is_not_empty(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(InvalidInput, match="exists already"):
            merge(with_experts("math"), tmp_path)

    def test_a_copy_that_computes_something_else(self, tmp_path: Path) -> None:
        """A hook on the live model is in no checkpoint."""
        model = with_experts("math")
        handle = model.get_base_model().model.norm.register_forward_hook(lambda m, a, h: 2 * h)
        with pytest.raises(UnsupportedModel, match="does not agree.*Nothing was written"):
            merge(model, tmp_path / "x")
        handle.remove()
        assert not list(tmp_path.iterdir())

    def test_a_wrong_base(self, tmp_path: Path) -> None:
        _, _, folder = nano(tmp_path)
        with pytest.raises(WrongBase):
            merge(folder, tmp_path / "x", base="nano-l")
        with pytest.raises(ModelNotFound):
            merge(folder, tmp_path / "x", base=tmp_path / "nowhere")
        with pytest.raises(InvalidInput, match="base goes with an expert's folder"):
            merge(with_experts("math"), tmp_path / "x", base="nano-s")
        nameless = with_experts("math")
        set_z(nameless, "math", 0)
        Expert.of(nameless, "math").save(tmp_path / "nameless")
        with pytest.raises(InvalidInput, match="does not say what its base is"):
            merge(tmp_path / "nameless", tmp_path / "x")
        assert not (tmp_path / "x").exists()


# --- a quantised base ----------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
def test_an_expert_of_a_quantised_base_leaves_with_the_weights_it_was_trained_on(
    bits: int, tmp_path: Path
) -> None:
    """As a stock model in 32 bits, and as a LoRA for it and for the quantised base."""
    tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    how = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    loaded = AutoModelForCausalLM.from_pretrained
    model = with_experts("math", model=loaded(tmp_path / "base", quantization_config=how).eval())
    live = logits(model)
    result = merge(model, tmp_path / "merged")
    assert torch.equal(logits(model), live)
    again = loaded(tmp_path / "merged").eval()
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())
    assert not any("absmax" in name or "SCB" in name for name in again.state_dict())
    near = float((logits(again) - live).abs().max() / max(1, live.abs().max()))
    assert near <= result.bound == 0.05 and 0 < result.difference <= 0.05
    with model.disable_adapter():
        plain = logits(model)
    assert not torch.allclose(plain, live, atol=0.05)
    lora = to_lora(model, tmp_path / "lora", rank=64)
    assert lora.energy == pytest.approx(1) and lora.logit_difference < 1e-3 < lora.effect
    quantised = loaded(tmp_path / "base", quantization_config=how).eval()
    adapted = PeftModel.from_pretrained(quantised, str(tmp_path / "lora")).eval()
    assert torch.allclose(logits(adapted), live, atol=0.05)
