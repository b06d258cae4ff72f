"""`pliant recover`: from a smaller model to a recovered stock one, and through Ctrl-C."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from tests.processes import Program
from tests.structure.models import saved
from transformers import AutoModelForCausalLM

from pliant.cli import app
from pliant.loading import load
from pliant.structure import PruneConfig, export, prune

STEPS = 6
SETTINGS = {
    "max_steps": STEPS,
    "save_steps": 2,
    "logging_steps": 1,
    "per_device_train_batch_size": 2,
    "use_cpu": "true",
}


@pytest.fixture(scope="module")
def smaller(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recover") / "smaller"
    model, tokenizer = load("nano-s")
    ids = torch.tensor([tokenizer("12 + 7 = 19").input_ids])
    prune(model, [{"input_ids": ids}], PruneConfig(channels=0.25, score="random", compensate=False))
    export(model, folder, tokenizer)
    return folder


def words(smaller: Path, out: Path, *more: str) -> list[str]:
    given = [word for k, v in SETTINGS.items() for word in ("--set", f"{k}={v}")]
    where = ["--data", "nano", "--rows", "60", "--out", str(out)]
    return ["recover", str(smaller), *where, "--teacher", "nano-s", *given, *more]


def losses(out: Path) -> list[float]:
    state = json.loads((out / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(out).state_dict())


def test_an_interrupted_run_is_resumed_as_if_it_had_not_been(
    smaller: Path, tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "interrupted"
    assert app.outcome(words(smaller, whole)) == 0
    shown = capsys.readouterr().out
    assert "of what was lost is back" in shown and "held-out loss before" in shown
    interrupt_after(3, words(smaller, out), root)
    assert not (out / "config.json").exists()
    assert app.outcome(words(smaller, out, "--resume", "--json")) == 0
    printed = capsys.readouterr()
    content = json.loads(printed.out)
    assert "resuming from checkpoint-" in printed.err and content["resumed_at"] >= 3
    assert losses(out) == losses(whole) and len(losses(out)) == STEPS
    ours, theirs = weights(out), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert {"before", "after", "teacher", "recovered"} <= content.keys()
    assert json.loads((out / "pliant_export.json").read_text())["recovery"]["steps"] == STEPS
    # The finished run is not begun again by mistake.
    assert app.outcome(words(smaller, out)) == 2
    assert "holds a run already: add --resume" in capsys.readouterr().err


def interrupt_after(step: int, arguments: list[str], root: Path) -> None:
    """Ctrl-C while the real command trains."""
    with Program("pliant", *arguments, cwd=root) as running:
        for line in running.stderr:
            if line.startswith(f"training, step {step} of"):
                running.send_signal(signal.SIGINT)
                break
        rest = running.stderr.read()
        assert running.wait(timeout=60) == 130, rest
    assert "interrupted" in rest


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--train", "some"), "'some' is not one of 'all', 'lora', 'norms'"),
        (("--distill", "1.5"), "distill = 1.5: give a share from 0 to 1"),
        (("--temperature", "0"), "temperature = 0.0: give a number above 0"),
        (("--set", "learning_rat=1"), "--set learning_rat: TrainingArguments has none; did you"),
        (("--evaluate", "missing.txt"), "there is no such file"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    more: tuple[str, ...],
    message: str,
    smaller: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert app.outcome(words(smaller, tmp_path / "out", *more)) == 2
    assert message in one_line(capsys)
    assert not (tmp_path / "out").exists()


def test_inputs_that_cannot_be_used(
    smaller: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    used = tmp_path / "used"
    used.mkdir()
    (used / "thesis.tex").write_text("dear")
    other = saved("llama", tmp_path / "other")  # 264 tokens, and nano-s has 260
    out = str(tmp_path / "out")
    plain = ["recover", str(smaller), "--data", "nano", "--out"]
    for arguments, message in (
        (["recover", str(tmp_path / "none"), "--data", "nano", "--out", out], "none"),
        ([*plain, str(used)], "is not empty"),
        ([*plain, out, "--distill", "0.5"], "distill = 0.5: give a teacher"),
        ([*plain, out, "--teacher", str(other)], "the teacher has a vocabulary of 264 tokens"),
        ([*plain, out, "--teacher", str(tmp_path / "none")], "none"),
        (["recover", str(smaller), "--data", "missing.txt", "--out", out], "no such file"),
    ):
        assert app.outcome(arguments) == 2
        assert message in one_line(capsys)
    assert not Path(out).exists()
    assert [path.name for path in used.iterdir()] == ["thesis.tex"]


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    complaint = capsys.readouterr().err.strip()
    assert complaint.startswith("error: ") and "\n" not in complaint
    return complaint


def test_a_pruned_model_is_recovered_beside_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pruned, out = tmp_path / "pruned", tmp_path / "out"
    model, tokenizer = load("nano-s")
    ids = torch.tensor([tokenizer("12 + 7 = 19").input_ids])
    how = PruneConfig(channels=0.25, score="random", compensate=False)
    prune(model, [{"input_ids": ids}], how).save(pruned)
    command = words(Path("nano-s"), out, "--adapters", str(pruned), "--json")
    command = [word for word in command if word not in ("--teacher",)]
    command.remove("nano-s")  # the teacher's name
    assert app.outcome([*command, "--train", "lora"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["teacher"] < result["before"] and result["train"] == "lora"
    again = AutoModelForCausalLM.from_pretrained(out)
    assert again.config.intermediate_size == model.config.intermediate_size * 3 // 4
    assert app.outcome([*command[:-1], "--out", str(tmp_path / "no")]) == 2
    assert "give --train lora or norms" in capsys.readouterr().err


def test_selected_tokens_are_trained(
    smaller: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By an engine that is asked for; a run this short trains every token if a race may decide."""
    results = {}
    for name in ("exact", "auto", "standard"):
        command = words(smaller, tmp_path / name, "--engine", name, "--distill", "0", "--json")
        assert app.outcome(command) == 0
        printed = capsys.readouterr()
        results[name] = json.loads(printed.out)
        assert ("every token is trained" in printed.err) == (name == "auto")
        record = json.loads((tmp_path / name / "pliant-train.json").read_text())
        assert ("engine" in record["plan"]) == (name != "standard")
    assert results["auto"]["after"] == pytest.approx(results["standard"]["after"], abs=1e-5)
    assert abs(results["exact"]["after"] - results["standard"]["after"]) > 1e-5
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "exact")
    assert not hasattr(again, "pliant")
    with_teacher = ["--engine", "sparse", "--distill", "0.5"]
    assert app.outcome(words(smaller, tmp_path / "no", *with_teacher)) == 2
    assert "give 0" in capsys.readouterr().err
