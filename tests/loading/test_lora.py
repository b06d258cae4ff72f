"""A LoRA's folder loads as its base with the LoRA merged; what is missing is one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from pliant import loading
from pliant.errors import ModelNotFound
from pliant.structure.exporting.disk_export import weight_files

CONFIG = "adapter_config.json"
IDS = torch.arange(5, 25)[None]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of nano-s that changes its logits."""
    model = loading.load_model("nano-s")
    settings = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    torch.manual_seed(0)
    peft = get_peft_model(model, settings)
    peft.peft_config["default"].base_model_name_or_path = "nano-s"
    folder = tmp_path_factory.mktemp("lora") / "mine"
    peft.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    for path in trained.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def edit(folder: Path, **changes: object) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@torch.no_grad()
def test_a_lora_is_its_base_with_the_lora_merged(trained: Path) -> None:
    model, tokenizer = loading.load(trained)
    base = loading.load_model("nano-s")
    plain = base(IDS).logits
    expected = PeftModel.from_pretrained(base, str(trained))(IDS).logits
    assert (expected - plain).abs().max() > 0.1
    assert torch.allclose(model(IDS).logits, expected, atol=1e-4)
    assert type(model).__name__ == "LlamaForCausalLM" and not model.training
    assert model.name_or_path == str(trained)
    assert tokenizer.get_vocab() == loading.load_tokenizer("nano-s").get_vocab()
    assert loading.load_config(trained).num_hidden_layers == model.config.num_hidden_layers
    assert loading.load_model(trained, dtype="bfloat16").dtype == torch.bfloat16
    assert weight_files(trained) == []  # those are of the LoRA alone


def test_a_tokenizer_in_the_folder_goes_first(folder: Path) -> None:
    own = loading.load_tokenizer("nano-s")
    own.chat_template = None
    own.save_pretrained(folder)
    assert loading.load(folder)[1].chat_template is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"base_model_name_or_path": "nano-z"}, "a LoRA of 'nano-z'.*base_model_name_or_path of"),
        ({"base_model_name_or_path": "/gone/base"}, "no such folder.*put its place in"),
        ({"base_model_name_or_path": "smollm2-135m"}, "pliant models get smollm2-135m"),
        ({"base_model_name_or_path": None}, "damaged adapter_config.json"),
        ({"peft_type": "SVF"}, "is an expert.*pliant expert merge .* --out merged"),
        ({"peft_type": "NEWEST"}, "no usable LoRA"),
        ({"r": 4}, "no usable LoRA"),
    ],
    ids=["unknown", "moved", "not fetched", "none", "expert", "another kind", "another rank"],
)
def test_why_a_lora_cannot_be_loaded(
    changes: dict[str, object], said: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLIANT_MODELS", str(folder / "models"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    edit(folder, **changes)
    with pytest.raises(ModelNotFound, match=said):
        loading.load_model(folder)


def test_a_lora_of_a_lora_is_refused(trained: Path, folder: Path) -> None:
    edit(folder, base_model_name_or_path=str(trained))
    with pytest.raises(ModelNotFound, match="which is a LoRA itself"):
        loading.load_config(folder)


def test_weights_that_are_missing_are_no_lora(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, path)
    with pytest.raises(ModelNotFound, match="no usable LoRA.*missing adapter keys"):
        loading.load_model(folder)
