"""`pliant doctor` answers from a config alone, however large the model, for people and machines."""

from __future__ import annotations

import json
import re
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import LlamaConfig, MambaConfig, T5Config

from pliant.cli import app
from pliant.loading import load_tokenizer

SEVENTY_BILLION = LlamaConfig(
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    vocab_size=128_256,
)


@pytest.fixture
def large(tmp_path: Path) -> str:
    """A folder with nothing but a config in it."""
    SEVENTY_BILLION.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    return str(tmp_path)


def test_a_model_of_seventy_billion_is_examined_without_its_weights(
    large: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = load_tokenizer("nano-s")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(large)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert app.outcome(["doctor", large]) == 0
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    said, complained = capsys.readouterr()
    assert complained == ""
    assert "70.6B" in said
    assert "has no chat template" in said and "--template" in said
    assert "141 GB in bf16" in said
    assert "Foundation: does Pliant recognise" in said
    assert "What each part would add to memory" in said
    assert grown < 2_000_000, "kilobytes: the weights would be 141 million of them"


def test_machines_get_one_document(large: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.outcome(["doctor", large, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"] == large and found["chat_template"] is None
    assert found["architecture"] == "LlamaForCausalLM"
    assert found["sizes"]["parameters"] == 70_553_706_496
    assert all(finding["ok"] for finding in found["findings"] if finding["name"] == "layers")
    assert {estimate["part"] for estimate in found["estimates"]} >= {"structure", "experts"}


def test_what_cannot_be_done_comes_with_its_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    MambaConfig(hidden_size=64, num_hidden_layers=2).save_pretrained(tmp_path)
    assert app.outcome(["doctor", str(tmp_path), "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)["findings"]
    (attention,) = (finding for finding in findings if finding["name"] == "attention")
    assert not attention["ok"]
    assert all(finding["ok"] or finding["reason"] for finding in findings)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: None, "without a config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "broken config.json"),
        (lambda folder: (folder / "config.json").write_text("{}"), "no usable config"),
        (lambda folder: T5Config().save_pretrained(folder), "no causal language model"),
        (
            lambda folder: LlamaConfig(hidden_act="nope").save_pretrained(folder),
            "cannot build.*nope",
        ),
    ],
    ids=["no config", "broken", "empty", "another kind", "impossible"],
)
def test_what_is_no_model_is_one_line_and_exit_code_two(
    make: Callable[[Path], object], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path)
    assert app.outcome(["doctor", str(tmp_path)]) == 2
    printed, complained = capsys.readouterr()
    assert printed == ""
    assert complained.count("\n") == 1
    assert re.search(said, complained)
