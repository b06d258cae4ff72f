"""`pliant score`: prompts from anywhere, scores for people and machines, one line for a mistake."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pliant.cli import app
from pliant.cli.score import shown
from pliant.complexity import CPXConfig
from pliant.complexity.facade import CPXCausalLM
from pliant.routing.outcomes import Outcomes
from pliant.routing.scorers import make

PROMPTS = ["What is 3 + 4?", "Sort: pear apple fig", "[CPX] or not?"]


@pytest.fixture(scope="module")
def model() -> CPXCausalLM:
    made = CPXCausalLM.from_pretrained(
        "nano-s", dtype="float32", config=CPXConfig(outputs=("score", "gain"))
    )
    with torch.no_grad():
        made.classifier.weight.normal_(generator=torch.Generator().manual_seed(0))
    return made


@pytest.fixture(scope="module")
def folder(model: CPXCausalLM, tmp_path_factory: pytest.TempPathFactory) -> str:
    where = tmp_path_factory.mktemp("scorer")
    model.save_pretrained(where)
    return str(where)


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    said, complained = capsys.readouterr()
    assert complained == ""
    return [json.loads(line) for line in said.splitlines()]


def outcome(*words: str) -> int:
    return app.outcome(["score", *words])


def test_prompts_as_arguments(
    model: CPXCausalLM, folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert outcome(folder, *PROMPTS, "--dtype", "float32", "--json") == 0
    rows, scores = lines(capsys), model.score(PROMPTS)
    assert [row["prompt"] for row in rows] == PROMPTS
    assert [row["score"] for row in rows] == pytest.approx(scores.score.tolist(), abs=1e-6)
    assert scores.gain is not None
    assert [row["gain"] for row in rows] == pytest.approx(scores.gain.tolist(), abs=1e-6)
    assert rows[0]["outputs"].keys() == {"score", "gain"}


def test_a_table_for_people(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome(folder, *PROMPTS) == 0
    said, _ = capsys.readouterr()
    title, head, *rows = said.strip().splitlines()
    assert title.endswith("3 prompts") and head.split() == ["score", "gain", "prompt"]
    assert all(prompt in row for prompt, row in zip(PROMPTS, rows, strict=True))
    assert outcome(folder, PROMPTS[0]) == 0
    assert capsys.readouterr().out.strip().splitlines()[0].endswith(": 1 prompt")


def test_prompts_from_files_and_stdin(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert outcome(folder, *PROMPTS, "--json") == 0
    wanted = lines(capsys)
    text, rows = tmp_path / "prompts.txt", tmp_path / "rows.jsonl"
    text.write_text("\n".join(PROMPTS) + "\n\n")
    rows.write_text("".join(json.dumps({"question": p, "id": 1}) + "\n" for p in PROMPTS))
    for words in (["--file", str(text)], ["--file", str(rows), "--column", "question"]):
        assert outcome(folder, *words, "--json") == 0
        assert lines(capsys) == wanted
    for words in ([], ["-"]):
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(PROMPTS)))
        assert outcome(folder, *words, "--json") == 0
        assert lines(capsys) == wanted


def test_conversations_and_chat(folder: str, tmp_path: Path, capsys: Any) -> None:
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps({"prompt": chat}) + "\n" for chat in chats))
    assert outcome(folder, "--file", str(file), "--json") == 0
    by_messages = lines(capsys)
    assert outcome(folder, *PROMPTS, "--chat", "--json") == 0
    by_chat = lines(capsys)
    assert [r["score"] for r in by_messages] == [r["score"] for r in by_chat]
    assert by_messages[0]["prompt"] == chats[0]
    assert outcome(folder, "--file", str(file)) == 0
    assert PROMPTS[1] in capsys.readouterr().out


def test_a_router_s_scorer(tmp_path: Path, capsys: Any) -> None:
    prompts = tuple(f"What is {i} + {i}?" * (i % 5 + 1) for i in range(60))
    right = np.array([[i % 5 < 2, 1] for i in range(60)], dtype=float)
    outcomes = Outcomes(
        prompts=prompts,
        models=("small", "large"),
        right=right,
        cost=np.tile([1.0, 5.0], (60, 1)),
        groups=None,
        wordings=None,
        unit="calls",
    )
    make("length").fit(outcomes, None, 0).save(tmp_path / "scorer")
    assert outcome(str(tmp_path / "scorer"), "What is 1 + 1?", "x" * 80, "--json") == 0
    short, long = lines(capsys)
    assert short["gain"] < long["gain"]
    assert outcome(str(tmp_path / "scorer"), "a", "--chat") == 2
    assert "--chat: the router's folder settles this" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["./nowhere", "x"], "no such folder"),
        (["my-router", "x"], "no such folder, so no scorer and no router"),
        (["one/two/router", "x"], "no such folder"),
        (["nano-s", "x"], "is a model, not a scorer"),
        (["FOLDER", "x", "--file", "y.txt"], "give one of the two"),
        (["FOLDER", "--file", "nowhere.txt"], "No such file"),
        (["FOLDER", "--file", "nowhere.jsonl"], "nowhere.jsonl"),
        (["FOLDER", "x" * 3000], "tokens long"),
        (["FOLDER", "x", "--truncation", "middle"], "'middle' is not one of 'left', 'right'"),
        (["FOLDER", "x", "--base", "nano-l"], "trained on another base"),
        (["FOLDER", "x", "--batch-size", "0"], "batch-size"),
        (["EMPTY", "x"], "holds no scorer"),
    ],
)
def test_a_mistake_is_one_line(
    words: list[str], said: str, folder: str, tmp_path: Path, capsys: Any
) -> None:
    places = {"FOLDER": folder, "EMPTY": str(tmp_path)}
    assert outcome(*(places.get(word, word) for word in words)) == 2
    out, complained = capsys.readouterr()
    assert out == "" and said in complained
    assert len(complained.splitlines()) == 1


@pytest.mark.parametrize("prompt", ["[]", "[1, 2]", "7", "null", '[{"role": 7}]'])
def test_a_row_without_a_prompt_is_named(
    prompt: str, folder: str, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "rows.jsonl").write_text(f'{{"prompt": "a"}}\n{{"prompt": {prompt}}}\n')
    assert outcome(folder, "--file", str(tmp_path / "rows.jsonl")) == 2
    assert "rows.jsonl, row 2" in capsys.readouterr().err


def test_stdin_that_is_no_text_is_said(folder: str, monkeypatch: Any, capsys: Any) -> None:
    for stdin in (io.TextIOWrapper(io.BytesIO(b"\xff"), "utf-8"), io.StringIO("\udcff")):
        monkeypatch.setattr(sys, "stdin", stdin)
        assert outcome(folder) == 2
        assert "stdin" in capsys.readouterr().err


def test_nothing_to_score_is_said(folder: str, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n \n"))
    assert outcome(folder) == 2
    assert "contains no prompts" in capsys.readouterr().err


def test_a_long_prompt_is_shown_in_one_short_line() -> None:
    assert shown("a\n b") == "a b"
    assert len(shown("word " * 100)) == 60
    assert shown([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]) == "u"
