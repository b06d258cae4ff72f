"""A LoRA's folder loads as its base with the LoRA merged; what is missing is one line."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from pliant import loading
from pliant.errors import ModelNotFound
from pliant.loading import hub
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


def in_cache(files: Iterable[Path], name: str, cache: Path) -> None:
    """A repository as the hub's client stores it: without a network it is all that there is."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)
    for path in files:
        (snapshot / path.name).write_bytes(path.read_bytes())


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of the hub's client."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@torch.no_grad()
def test_a_lora_of_the_hub_loads_as_its_folder_does(trained: Path, cache: Path) -> None:
    in_cache(trained.iterdir(), "someone/some-lora", cache)
    model, tokenizer = loading.load("someone/some-lora")
    assert torch.equal(model(IDS).logits, loading.load_model(trained)(IDS).logits)
    assert model.name_or_path == "someone/some-lora"
    assert loading.public_name(model.name_or_path) == "someone/some-lora"
    assert tokenizer.get_vocab() == loading.load_tokenizer("nano-s").get_vocab()
    assert loading.load_config("someone/some-lora").model_type == "llama"
    assert not loading.is_encoder("someone/some-lora")


def test_a_model_of_the_hub_with_a_lora_beside_it_is_the_model(trained: Path, cache: Path) -> None:
    config = loading.WEIGHTS / "nano-s" / "config.json"
    in_cache([*trained.iterdir(), config], "someone/both", cache)
    assert hub.with_lora(loading.resolve("someone/both")).kind == "hub"
    assert loading.load_config("someone/both").model_type == "llama"


@pytest.mark.parametrize(
    ("base", "said"),
    [
        ("someone/gone", "'someone/some-lora' is a LoRA of 'someone/gone'.*cannot be loaded"),
        ("someone/some-lora", "which is a LoRA itself"),
    ],
)
def test_why_a_lora_of_the_hub_cannot_be_loaded(
    folder: Path, cache: Path, base: str, said: str
) -> None:
    edit(folder, base_model_name_or_path=base)
    in_cache(folder.glob("*.*"), "someone/some-lora", cache)
    with pytest.raises(ModelNotFound, match=said):
        loading.load("someone/some-lora")


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
