"""`pliant expert train`: from a task to an expert, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel

from pliant.cli import app
from pliant.data import write_rows
from pliant.experts.model import svf_layers
from pliant.loading import load

SMALL = ["--steps", "2", "--max-new-tokens", "4", "--device", "cpu"]
SMALL += ["--set", "prompts=2", "--set", "group=2", "--set", "save_steps=1"]


@pytest.fixture
def task(tmp_path: Path) -> str:
    rows = [
        {"prompt": f"{i}+1", "answer": str(i + 1), "group": "sums" if i % 2 else "more"}
        for i in range(30)
    ]
    write_rows(tmp_path / "task.jsonl.gz", rows)
    return str(tmp_path / "task.jsonl.gz")


def command(task: str, out: Path, *more: str) -> list[str]:
    return ["expert", "train", "--base", "nano-s", "--task", task, "--out", str(out), *more]


def test_it_trains_an_expert_and_prints_what_it_came_to(
    task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sums"
    more = ["--group", "sums"]
    assert app.outcome(command(task, out, *SMALL, *more, "--json")) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["steps"] == 2 and result["held_out"] == 3 and result["before"]["level"] == 0.95
    loaded = PeftModel.from_pretrained(load("nano-s")[0], str(out))
    assert any(bool(d.any()) for _, layer in svf_layers(loaded) for d in layer.changes().values())
    sizes = [path.stat().st_size for path in out.glob("adapter_*")]
    assert len(sizes) == 2 and sum(sizes) < 60_000
    settings, card = (out / name for name in ("adapter_config.json", "README.md"))
    assert json.loads(settings.read_text())["base_model_name_or_path"] == "nano-s"
    assert "base_model: nano-s\n" in card.read_text()
    card.write_text("mine")
    assert result["compared"] is None
    again = ["--resume", "--report", str(tmp_path / "page.html")]
    controls = ["--compare", "few-shot", "--compare", "lora", "--shots", "2", "--lora-rank", "1"]
    assert app.outcome(command(task, out, *SMALL, *more, *again, *controls)) == 0
    assert card.read_text() == "mine"
    shown = capsys.readouterr().out
    assert "3 held-out rows, before" in shown and "2 steps on " in shown
    page = (tmp_path / "page.html").read_text()
    for text in ("base, 2 examples", "LoRA, rank 1", "on 3 held-out rows the expert has "):
        assert text in page and text in shown
    assert "What was gained" in page and "How it learned" in page and "Where it acts" in page
    # ways, reward, KL, changes by layer, the spectrum by layer and by projection
    assert page.count("<svg") == 6 and page.count('class="verdict') == 1


def test_a_kind_of_question_is_a_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pliant.cli.expert import train

    monkeypatch.setattr(train, "MEASURED", 4)
    page = tmp_path / "page.html"  # fewer singular values than a spectrum has groups
    arguments = [*SMALL, "--rows", "6", "--reward", "exact", "--reward", "contains=0.5", "--json"]
    arguments += ["--set", "rank=3", "--report", str(page)]
    assert app.outcome(command("nano:arithmetic", tmp_path / "out", *arguments)) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["held_out"] == 4 and result["after"]["value"] <= 1.5
    plan = json.loads((tmp_path / "out" / "pliant-train.json").read_text())["plan"]
    assert plan["reward"] == ["exact=1", "contains=0.5"]
    assert page.read_text().count("spectrum of z") == 2


def test_no_row_is_trained_on_and_measured(task: str, tmp_path: Path) -> None:
    from pliant.cli.expert.train import TrainOptions, nano_rows, task_rows

    write_rows(tmp_path / "other.jsonl", [{"prompt": " 3+1 ", "answer": "4"}])
    options = TrainOptions(
        base="nano-s", task=task, out=tmp_path, evaluate=str(tmp_path / "other.jsonl")
    )
    rows, held_out = task_rows(options, 0)
    assert len(rows) == 29 and "3+1" not in [row["prompt"] for row in rows] and len(held_out) == 1
    asked = nano_rows("add", "train", 20, 0)[0]
    write_rows(tmp_path / "asked.jsonl", [asked])
    evaluate = str(tmp_path / "asked.jsonl")
    options = TrainOptions(base="nano-s", task="nano:add", out=tmp_path, evaluate=evaluate, rows=20)
    assert asked["prompt"] not in [row["prompt"] for row in task_rows(options, 0)[0]]
    splits = [{r["prompt"] for r in nano_rows("add", s, 300, 0)} for s in ("train", "test")]
    assert splits[0].isdisjoint(splits[1])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--set", "report_to=tensorbord"], "there is no such log; did you mean 'tensorboard'"),
        (["--set", "report_to=wandb"], "wandb is not installed: pip install wandb"),
        (["--compare", "fewshot"], "'--compare': 'fewshot' is not one of 'few-shot', 'lora'"),
        (["--lora-learning-rate", "0"], "lora_learning_rate = 0.0: give a number above 0"),
        (["--reward", "exakt"], "no reward 'exakt'; did you mean 'exact'"),
        (["--reward", "nonesuch.py:f"], "nonesuch.py"),
        (["--group", "sum"], "no group 'sum'; did you mean 'sums'"),
        (["--method", "ppo"], "'ppo' is not one of 'grpo', 'rloo', 'reinforce'"),
        (["--set", "temprature=1"], "temprature: there is none; did you mean 'temperature'"),
        (["--set", "temperature=0"], "temperature = 0.0: give a number above 0"),
        (["--base", "nano-x"], "nano-x"),
        (["--set", "report_to=paper"], "report_to = 'paper': there is no such log"),
        (["--seed", str(2**32)], "--seed: must be at most 4,294,967,295"),
        (["--task", "nano:sums"], "no such kind"),
        (["--reward", "choice"], "row 1 of the task: choice: the reference"),
        (["--task", "nonesuch.jsonl"], "there is no such file"),
    ],
)
def test_bad_input_is_one_line_before_a_model_is_loaded(
    task: str,
    tmp_path: Path,
    more: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("pliant.loading.load", load)
    monkeypatch.setattr("pliant.training.arguments.find_spec", lambda package: None)
    monkeypatch.chdir(tmp_path)
    assert app.outcome(command(task, tmp_path / "out", *SMALL, *more)) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_task_without_a_column_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path / "task.jsonl", [{"promt": "a", "answer": "b"}])
    assert app.outcome(command(str(tmp_path / "task.jsonl"), tmp_path / "out")) == 2
    assert "no column 'prompt'; did you mean 'promt'" in capsys.readouterr().err


def test_a_folder_with_something_else_is_left_alone(
    task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert app.outcome(command(task, tmp_path / "out", *SMALL)) == 2
    assert "is not empty" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["notes.txt"]
