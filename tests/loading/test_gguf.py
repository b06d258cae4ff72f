"""A GGUF file is a model: found by its name, loaded as what it holds, and dense from then on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from tests import gguf_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from pliant import loading
from pliant.adapters import fingerprint
from pliant.complexity import CPXConfig, attach
from pliant.errors import InvalidInput, ModelNotFound

PROMPTS = ["the cat", "a much longer text about the weather of tomorrow"]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return gguf_file.tiny_llama()


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory, model: PreTrainedModel) -> Path:
    return gguf_file.write(tmp_path_factory.mktemp("exact") / "tiny.F32.gguf", model)


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory, model: PreTrainedModel) -> Path:
    return gguf_file.write(tmp_path_factory.mktemp("q8") / "tiny.Q8_0.gguf", model, "Q8_0")


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(torch.arange(40)[None]).logits
    return result


def test_a_file_in_fp32_is_the_model_it_was_made_of(exact: Path, model: PreTrainedModel) -> None:
    loaded, tokenizer = loading.load(exact)
    ours, theirs = loaded.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(logits(loaded), logits(model))
    assert tokenizer.decode(tokenizer("Hello, you").input_ids) == "Hello, you"
    assert tokenizer.eos_token == "<|end|>" and tokenizer.chat_template


def test_a_file_a_folder_and_the_option_are_the_same(quantised: Path) -> None:
    by_path = loading.load_model(str(quantised))
    by_folder = loading.load_model(quantised.parent)
    by_option = loading.load_model(quantised.parent, gguf_file=quantised.name)
    assert torch.equal(logits(by_path), logits(by_folder))
    assert torch.equal(logits(by_path), logits(by_option))


def test_a_dtype_can_be_asked_for(quantised: Path) -> None:
    assert loading.load_model(quantised).dtype == torch.float32
    assert loading.load_model(quantised, dtype="bfloat16").dtype == torch.bfloat16


def test_it_is_dense_and_saves_as_a_stock_model(quantised: Path, tmp_path: Path) -> None:
    loaded = loading.load_model(quantised)
    assert not loaded.is_quantized and "quantization_config" not in loaded.config.to_dict()
    loaded.save_pretrained(tmp_path / "stock")
    again = loading.load_model(tmp_path / "stock")
    assert torch.equal(logits(again), logits(loaded))


def test_its_fingerprint_is_that_of_the_stock_model(quantised: Path, tmp_path: Path) -> None:
    loaded = loading.load_model(quantised)
    loaded.save_pretrained(tmp_path / "stock")
    here, there = fingerprint(loaded), fingerprint(loading.load_model(tmp_path / "stock"))
    assert here.level == "values" and not here.differences(there)


def test_marks_that_transformers_leaves_are_not_believed(quantised: Path, tmp_path: Path) -> None:
    """Loaded by transformers alone, the model says that it is quantised, and is dense."""
    marked = AutoModelForCausalLM.from_pretrained(quantised.parent, gguf_file=quantised.name)
    assert marked.is_quantized and marked.config.quantization_config
    assert fingerprint(marked).level == "values"
    scorer = attach(marked, CPXConfig(), loading.load_tokenizer(quantised))
    with torch.no_grad():
        scorer.rows.add_(torch.randn_like(scorer.rows))
    export = scorer.export(tmp_path / "stock")
    assert export.difference <= export.bound
    scorer.detach()


def test_a_scorer_moves_between_the_file_and_the_stock_model(
    quantised: Path, tmp_path: Path
) -> None:
    loaded, tokenizer = loading.load(quantised)
    scorer = attach(loaded, CPXConfig(), tokenizer)
    with torch.no_grad():
        scorer.rows.add_(torch.randn_like(scorer.rows))
    scores = scorer.score(PROMPTS).score
    scorer.save_pretrained(tmp_path / "scorer")
    scorer.detach()
    loaded.save_pretrained(tmp_path / "stock")
    base = loading.load_model(tmp_path / "stock")
    again = type(scorer).from_pretrained(base, tmp_path / "scorer", tokenizer=tokenizer)
    assert abs(again.score(PROMPTS).score - scores).max() < 1e-6


def test_several_files_need_a_name(quantised: Path, exact: Path, tmp_path: Path) -> None:
    for path in (quantised, exact):
        shutil.copy(path, tmp_path)
    (tmp_path / "mmproj-tiny.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelNotFound, match=r"holds 2 GGUF files .*name one"):
        loading.resolve(tmp_path)
    assert loading.resolve(tmp_path, exact.name).gguf == exact.name
    with pytest.raises(ModelNotFound, match=r"has no file 'other.gguf'"):
        loading.resolve(tmp_path, "other.gguf")
    with pytest.raises(InvalidInput, match=r"ends in .gguf"):
        loading.resolve(tmp_path, "model.safetensors")


def test_a_stock_model_beside_a_file_comes_first(quantised: Path, tmp_path: Path) -> None:
    loading.load_model(quantised).save_pretrained(tmp_path)
    shutil.copy(quantised, tmp_path)
    assert not loading.resolve(tmp_path).gguf
    (tmp_path / "model.safetensors").unlink()
    assert loading.resolve(tmp_path).gguf == quantised.name


@pytest.mark.parametrize("content", [b"", b"GGU", b"GGUF", b"GGUF" + bytes(100)])
def test_a_broken_file_is_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelNotFound) as error:
        loading.load_model(path)
    assert "broken.gguf" in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"no such file"):
        loading.load_model(str(tmp_path / "none.gguf"))
    with pytest.raises(ModelNotFound, match=r"'none.gguf': no such file"):
        loading.load_model("none.gguf")


def test_without_the_package_it_says_what_to_install(
    quantised: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pliant.loading.models.find_spec", lambda name: None)
    with pytest.raises(InvalidInput, match=r"pip install 'pliant\[gguf\]'"):
        loading.load_model(quantised)


@pytest.mark.parametrize("name", ["nano-s", "smollm2-135m"])
def test_a_file_beside_a_name_is_refused(name: str) -> None:
    with pytest.raises(InvalidInput, match=r"goes with a folder or a hub name"):
        loading.resolve(name, "model.gguf")


def test_a_file_beside_a_file_is_refused(exact: Path) -> None:
    with pytest.raises(InvalidInput, match=r"goes with a folder or a hub name"):
        loading.resolve(exact, "model.gguf")


def test_a_part_of_a_split_file_is_named(tmp_path: Path) -> None:
    part = tmp_path / "model-00001-of-00002.gguf"
    part.write_bytes(b"GGUF")
    for name, file in ((part, None), (tmp_path, None), (tmp_path, part.name)):
        with pytest.raises(ModelNotFound, match=r"one part of a split GGUF file"):
            loading.resolve(name, file)
