"""`pliant train lm`: from a file to a stock model, and through a kill as if there had been none."""

from __future__ import annotations

import json
import pickle
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.processes import Program
from transformers import AutoModelForCausalLM, AutoTokenizer

from pliant.cli import app
from pliant.loading import load, load_config, load_tokenizer

STEPS = 9
SETTINGS = {
    "max_steps": STEPS,
    "save_steps": 3,
    "logging_steps": 1,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 0.001,
    "use_cpu": "true",
}


def words(out: Path, *more: str, data: str = "nano", model: str = "nano-s") -> list[str]:
    given = [word for k, v in SETTINGS.items() for word in ("--set", f"{k}={v}")]
    chosen = ["--choose", "warmup_steps=2", "--choose", "dense_every=4", "--rows", "40"]
    chosen += [] if "--engine" in more else ["--engine", "sparse"]
    where = ["--model", model, "--data", data, "--out", str(out)]
    return ["train", "lm", *where, *chosen, *given, *more]


def record(out: Path) -> dict[str, Any]:
    found = json.loads((out / "pliant-train.json").read_text())
    return dict(found)


def losses(out: Path) -> list[float]:
    state = json.loads((out / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(out).state_dict())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody killed."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert app.outcome(words(out)) == 0
    return out


def test_what_it_leaves_is_a_stock_model(whole: Path) -> None:
    _, report = AutoModelForCausalLM.from_pretrained(whole, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    before, tokenizer = load("nano-s")
    assert AutoTokenizer.from_pretrained(whole)("2 + 3").input_ids == tokenizer("2 + 3").input_ids
    after = weights(whole)
    assert not torch.equal(before.state_dict()["lm_head.weight"], after["lm_head.weight"])
    kept = json.loads((whole / "config.json").read_text())
    assert kept["use_cache"] and not (whole / ".model.unfinished").exists()
    assert len(losses(whole)) == STEPS


def killed_after(step: int, out: Path, root: Path) -> None:
    with Program("pliant", *words(out), cwd=root) as running:
        for line in running.stderr:
            if line.startswith(f"training, step {step} of"):
                running.send_signal(signal.SIGKILL)
                break
        assert running.wait(timeout=60) == -signal.SIGKILL


def test_a_killed_run_is_resumed_as_if_it_had_not_been(
    whole: Path, tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "killed"
    killed_after(5, out, root)
    assert "ended" not in record(out) and (out / "checkpoint-3").is_dir()
    # A checkpoint that the kill tore: all of its files, the last of them cut short.
    torn = out / "checkpoint-6"
    torn.mkdir(exist_ok=True)
    for file in (out / "checkpoint-3").iterdir():
        if file.is_file():
            (torn / file.name).write_bytes(file.read_bytes())
    (torn / "optimizer.pt").write_bytes(b"half")
    state = out / "checkpoint-3" / "optimizer.pt"
    saved = state.read_bytes()
    state.write_bytes(pickle.dumps(Path("x")).ljust(len(saved), b"\0"))  # would import, if loaded
    assert app.outcome(words(out, "--resume")) == 2
    assert "checkpoint-3: its state cannot be read" in capsys.readouterr().err
    state.write_bytes(saved)
    torn.mkdir(exist_ok=True)
    (torn / "optimizer.pt").write_bytes(b"half")
    assert app.outcome(words(out, "--resume")) == 0
    said = capsys.readouterr().err
    assert "checkpoint-6 was not finished" in said and "resuming from checkpoint-3" in said
    assert losses(out) == losses(whole)
    mine, theirs = weights(out), weights(whole)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    ours, uncut = record(out)["ended"], record(whole)["ended"]
    assert ours["resumed_at"] == 3
    for key in ("steps", "first_loss", "last_loss", "tokens", "trained"):
        assert ours[key] == uncut[key], key


def test_a_run_that_has_ended_can_be_resumed_too(
    whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = weights(whole)
    unfinished = whole / ".model.unfinished"  # as when the kill came while the model was saved
    unfinished.mkdir()
    (unfinished / "model.safetensors").write_bytes(b"half")
    assert app.outcome(words(whole, "--resume", "--json")) == 0
    assert not unfinished.exists()
    assert json.loads(capsys.readouterr().out)["steps"] == STEPS
    assert all(torch.equal(before[name], one) for name, one in weights(whole).items())


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ((), "holds a run already: add --resume"),
        (("--resume", "--ratio", "0.5"), r"begun with another config (ratio)"),
        (("--resume", "--set", "weight_decay=0.1"), "begun with another settings (weight_decay)"),
        (("--resume", "--rows", "39"), "begun with other data"),
    ],
)
def test_another_run_is_not_taken_for_this_one(
    whole: Path, more: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.outcome(words(whole, *more)) == 2
    assert said in one_line(capsys)


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    complaint = capsys.readouterr().err.strip()
    assert complaint.startswith("error: ") and "\n" not in complaint
    return complaint


def test_text_trains_with_lora_and_is_merged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("A bird in the hand is worth two in the bush. " * 30)
    out = tmp_path / "out"
    more = ("--lora", "2", "--length", "64", "--engine", "exact", "--evaluate", str(text))
    assert app.outcome(words(out, *more, data=str(text))) == 0
    shown = capsys.readouterr().out
    assert "of these trained" in shown and "loss on evaluation data" in shown
    before = load("nano-s")[0].state_dict()
    after = weights(out)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all("proj" in name for name in moved)
    assert (out / "lora" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--engine", "fast"), "'fast' is not one of 'auto', 'sparse'"),
        (("--ratio", "0"), "ratio = 0.0: give a share above 0"),
        (("--choose", "mixx=1"), "--choose mixx: there is none; did you mean 'mix'?"),
        (("--choose", "mix=much"), "--choose mix=much:"),
        (("--score", "excess"), "'excess' is not one of 'gradient'"),
        (("--set", "learning_rat=1"), "--set learning_rat: TrainingArguments has none; did you"),
        (("--set", "weight_decay=low"), "weight_decay: invalid float value: 'low'"),
        (("--set", "weight_decay"), "--set 'weight_decay': write it as name=value"),
        (("--set", "label_smoothing_factor=.1"), "settled by pliant train itself"),
        (("--set", "save_total_limit=1"), "Keep 2 or more"),
        (("--set", "save_strategy=sometimes"), "--set:"),
        (("--set", "weight_decay=0", "--set", "weight_decay=1"), "weight_decay is given twice"),
        (("--set", "per_device_eval_batch_size=0"), "per_device_eval_batch_size=0: give 1 or more"),
        (("--set", "dataloader_num_workers=-1"), "dataloader_num_workers=-1: give 0 or more"),
        (("--seed", "1", "--set", "seed=2"), "--seed and --set seed: give one of them"),
        (("--device", "xpu"), "device 'xpu' cannot be used"),
        (("--device", "meta"), "device 'meta' cannot be used: it holds no numbers"),
        (("--report-to", "paper"), "'paper' is not one of 'none', 'tensorboard', 'wandb'"),
        (("--text-column", "a", "--messages-column", "b"), "and not text and messages"),
        (("--length", "4096"), "--length 4096: the model has 2048 positions"),
    ],
)
def test_a_mistake_is_one_line(
    tmp_path: Path, more: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.outcome(words(tmp_path / "out", *more)) == 2
    assert said in one_line(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["train lm", "recover", "gradients audit"])
def test_a_missing_chat_template_is_said_before_weights_are_read(
    tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"  # without weights
    load_config("nano-s").save_pretrained(model)
    tokenizer = load_tokenizer("nano-s")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(model)
    data = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "2+3?"}, {"role": "assistant", "content": "5"}]
    data.write_text(json.dumps({"messages": turns}) + "\n")
    out = [] if command == "gradients audit" else ["--out", str(tmp_path / "out")]
    named = [str(model)] if command == "recover" else ["--model", str(model)]
    teacher = ["--teacher", "nano-s"] if command == "recover" else []
    arguments = [*command.split(), *named, "--data", str(data), *teacher, *out]
    assert app.outcome(arguments) == 2
    assert "has no chat template" in one_line(capsys)


def test_settings_that_do_not_go_together_leave_the_folder_free(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.outcome(words(tmp_path / "out", "--set", "eval_strategy=steps")) == 2
    assert "settings do not go together: You have set `args.eval_strategy`" in one_line(capsys)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "there is no such file"),
        ('{"question": "a"}\n', "the first has 'question'"),
        ('{"text": "a"}\n{"other": "b"}\n', "row 2 has no 'text'"),
        ('{"text": 3}\n', "row 1: its text is 3"),
        ('{"prompt": "a", "completion": 3}\n', "row 1: prompt and completion are texts"),
        ('{"messages": [{"role": "user", "content": "a"}]}\n', "no message is the assistant's"),
        ("", "no rows"),
    ],
)
def test_data_that_cannot_be_trained_on(
    tmp_path: Path, content: str | None, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "rows.jsonl"
    if content is not None:
        data.write_text(content)
    assert app.outcome(words(tmp_path / "out", data=str(data))) == 2
    assert said in one_line(capsys)


def test_a_folder_with_something_else_in_it_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").write_text("dear")
    assert app.outcome(words(tmp_path)) == 2
    assert "is not empty" in one_line(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
