"""`pliant doctor` answers from a config alone, however large the model, for people and machines."""

from __future__ import annotations

import gc
import json
import re
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import LlamaConfig, MambaConfig, T5Config

from pliant.cli import app
from pliant.cli.doctor import DoctorOptions, doctor
from pliant.cli.doctor_sentences import NEEDED, SUBJECTS, Statement, summary
from pliant.errors import ModelNotFound
from pliant.loading import load_tokenizer
from pliant.survey import CAPABILITIES, examine

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
    assert "KB a token" in said
    assert "What each part would add to memory" not in said and f"doctor {large} --all" in said
    assert grown < 2_000_000, "kilobytes: the weights would be 141 million of them"


def test_no_time_is_spent_on_collecting_garbage() -> None:
    """There is little, and the search for it among all that is imported takes half a second."""
    phases: list[str] = []

    def record(phase: str, _: object) -> None:
        phases.append(phase)

    gc.callbacks.append(record)
    try:
        doctor(DoctorOptions("nano-s"))
        assert gc.isenabled()
        with pytest.raises(ModelNotFound):
            doctor(DoctorOptions("./no-such-folder"))
        assert gc.isenabled(), "after an error, too"
    finally:
        gc.callbacks.remove(record)
    assert len(phases) <= 4, "one may follow each command, and begins and ends"


def test_five_sentences_come_first_and_all_else_with_all(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert app.outcome(["doctor", "nano-s", "--all"]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("nano-s (LlamaForCausalLM, ") and first.endswith("3 layers)")
    answers = [line.split(". ")[0] for line in lines[:5]]
    assert answers == [f"{subject}: yes" for subject in SUBJECTS]
    assert "Each prompt of a batch can have its own" in lines[3]
    text = "\n".join(lines)
    assert "Can Pliant read this architecture: does it find the layers?" in text
    assert all(capability.question in text for capability in CAPABILITIES)
    assert "192 KB in bf16" in text and "What each part would add to memory" in text


def test_what_is_not_all_possible_says_why() -> None:
    statements = summary(examine(MambaConfig(hidden_size=64, num_hidden_layers=2)), "m")
    answers = ["yes", "partly", "yes", "partly", "no"]
    assert [statement.answer for statement in statements] == answers
    text = " ".join(map(str, statements))
    for part in ("--engine exact", "All prompts of a batch have the same", "again in each epoch"):
        assert part in text


def test_a_model_that_cannot_be_scored_is_no_scorer_s_base() -> None:
    examined = examine(MambaConfig(hidden_size=64, num_hidden_layers=2), NEEDED)

    def without(name: str) -> Statement:
        findings = tuple(
            replace(f, ok=False, reason="no states") if f.name == name else f
            for f in examined.findings
        )
        return summary(replace(examined, findings=findings))[0]

    assert (summary(examined)[0].answer, without("scores").answer) == ("yes", "no")
    assert without("score + generate").answer == "partly"
    assert "A scorer cannot read it: no states" in str(without("scores"))


def test_without_known_layers_nothing_is_possible() -> None:
    unknown = replace(examine(MambaConfig(hidden_size=64, num_hidden_layers=2), NEEDED))
    findings = tuple(
        replace(f, ok=False, reason="no list of layers") if f.name == "layers" else f
        for f in unknown.findings
    )
    statements = summary(replace(unknown, findings=findings))
    assert {str(s).partition(": ")[2] for s in statements} == {
        "no. Pliant cannot read this architecture: no list of layers."
    }


def test_machines_get_one_document(large: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.outcome(["doctor", large, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"] == large and found["chat_template"] is None
    assert found["architecture"] == "LlamaForCausalLM"
    assert len(found["findings"]) == len(CAPABILITIES)
    assert [each["answer"] for each in found["summary"]] == ["yes"] * 5
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
