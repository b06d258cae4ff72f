"""`python -m pliant.complexity`: the seeds' flags, rows from files, one line for what is wrong."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from tests.processes import Program, run_two

import pliant
from pliant import loading
from pliant.complexity import Complexity
from pliant.complexity.__main__ import main
from pliant.complexity.training import run
from pliant.complexity.training.config import CPXDatasetConfig, CPXModelConfig, CPXTrainingConfig
from pliant.nano import questions


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Products are hard."""
    asked = questions("dev", 60, 1, ["multiply", "subtract"])
    rows = [{"prompt": q.prompt, "label": int(q.family == "multiply")} for q in asked]
    path = tmp_path / "labels.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_seeds_flags_train_and_save_a_scorer(data: Path, tmp_path: Path, capsys: Any) -> None:
    flags = ["--model_name", "nano-s", "--batch_size", "8", "--num_epochs", "2"]
    flags += ["--data_size", "40", "--evaluation_size", "10", "--data", str(data)]
    flags += ["--device", "cpu", "--output_dir", str(tmp_path / "out"), "--lora_rank", "2"]
    flags += ["--lora_alpha", "3", "--lora_targets", "q_proj", "down_proj"]
    assert main(flags) == 0
    printed = capsys.readouterr().out
    assert "for 2 epochs over 40 prompts" in printed and "saved in" in printed
    model, _ = pliant.load("nano-s")
    scorer = Complexity.from_pretrained(model, tmp_path / "out")
    config = scorer.config
    assert (config.lora_rank, config.lora_alpha) == (2, 3.0)
    assert config.lora_targets == ("q_proj", "down_proj")
    assert scorer.head.weight.abs().max() > 0
    assert sum(p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors")) < 40_000


def test_csv_with_columns_of_other_names(data: Path, tmp_path: Path, capsys: Any) -> None:
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    path = tmp_path / "labels.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["question", "hard"])
        writer.writeheader()
        writer.writerows({"question": r["prompt"], "hard": r["label"]} for r in rows)
    columns = ["--prompt_column", "question", "--label_column", "hard"]
    common = ["--data", str(path), "--num_epochs", "1", "--device", "cpu"]
    out = ["--output_dir", str(tmp_path / "out")]
    assert main([*common, *columns, *out, "--evaluation_data", str(path)]) == 0
    assert "60 of the 60 test rows" in capsys.readouterr().err
    assert main([*common, *out, "--prompt_column", "question", "--label_column", "had"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("slowdown", "dtype"), [(4.0, "float32"), (0.5, "bfloat16")], ids=["slow", "fast"]
)
def test_a_base_in_half_precision_is_computed_in_what_is_fastest(
    data: Path,
    tmp_path: Path,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
    slowdown: float,
    dtype: str,
) -> None:
    model, tokenizer = pliant.load("nano-s", dtype="bfloat16")
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "base")
    out = tmp_path / "out"
    flags = ["--model_name", str(tmp_path / "base"), "--data", str(data), "--device", "cpu"]
    flags += ["--output_dir", str(out), "--num_epochs", "2", "--save_epochs"]
    monkeypatch.setattr(loading, "slowdown_of", lambda dtype: slowdown)
    assert main(flags) == 0
    message = "bfloat16 takes 4.0 times as long as float32 on this CPU"
    assert (message in capsys.readouterr().err) == (dtype == "float32")
    record = out / "pliant-train.json"
    assert json.loads(record.read_text())["base_dtype"] == dtype
    before = (out / "pliant.json").read_bytes()
    # Resumed where the other dtype is faster: the run goes on as it began.
    last = max(out.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    (last / "complete.json").unlink()
    monkeypatch.setattr(loading, "slowdown_of", lambda dtype: 1 / slowdown)
    assert main([*flags, "--resume"]) == 0
    assert (out / "pliant.json").read_bytes() == before
    assert json.loads(record.read_text())["base_dtype"] == dtype


def test_a_named_dtype_is_left_alone(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "slowdown_of", lambda dtype: 4.0)
    out = tmp_path / "out"
    flags = ["--data", str(data), "--device", "cpu", "--output_dir", str(out), "--num_epochs", "1"]
    assert main([*flags, "--dtype", "bfloat16"]) == 0
    assert json.loads((out / "pliant-train.json").read_text())["base_dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "no data"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--data", "DATA", "--label_column", "lable"], "'lable'"),
        (["--data", "DATA", "--evaluation_size", "60"], "none are left"),
        (["--data", "DATA", "--batch_size", "0"], "batch_size = 0"),
        (["--data", "DATA", "--model_name", "nano-x"], "nano-x"),
        (["--data", "DATA", "--max_length", "3"], "tokens long"),
        (["--data", "DATA", "--loss", "ce"], "two or more outputs"),
        (["--data", "DATA", "--scheduler", "steep"], "steep is not a valid SchedulerType"),
        (["--data", "DATA", "--output_dir", "DATA/below"], "Not a directory"),
        (["--data", "DATA", "--seed", "-1"], "seed = -1"),
        (["--data", "DATA", "--seed", str(2**32)], "--seed: must be at most 4,294,967,295"),
        (["--data", "DATA", "--max_grad_norm", "nan"], "--max-grad-norm: must be a finite number"),
        (["--data", "DATA", "--logging_steps", "-3"], "logging_steps = -3"),
    ],
)
def test_what_is_wrong_is_one_line(
    data: Path, tmp_path: Path, capsys: Any, flags: list[str], message: str
) -> None:
    given = [flag.replace("DATA", str(data)) for flag in flags]
    assert main(["--device", "cpu", "--output_dir", str(tmp_path / "out"), *given]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_a_bad_label_is_named_with_its_row(data: Path, tmp_path: Path, capsys: Any) -> None:
    rows = data.read_text().splitlines()[:4]
    data.write_text("\n".join([*rows, json.dumps({"prompt": "9", "label": 1.5})]))
    common = ["--data", str(data), "--device", "cpu", "--output_dir", str(tmp_path / "out")]
    for seed in ("0", "1", "2"):  # rows are shuffled after they are read
        assert main([*common, "--seed", seed]) == 2
        assert "row 5: label 1.5 cannot be used" in capsys.readouterr().err


@pytest.mark.parametrize(("seed", "message"), [("0", "3 (= 21)"), ("1", "21 (= 3)")])
def test_duplicates_are_told_by_the_rows_of_the_file(
    data: Path, tmp_path: Path, capsys: Any, seed: str, message: str
) -> None:
    """Whichever of the two is held back."""
    rows = data.read_text().splitlines()[:20]
    data.write_text("\n".join([*rows, rows[2]]))
    common = ["--data", str(data), "--device", "cpu", "--output_dir", str(tmp_path / "out")]
    assert main([*common, "--num_epochs", "1", "--evaluation_size", "8", "--seed", seed]) == 0
    assert f"1 of the 8 test rows (12.5%) are in the training set too: rows {message}" in (
        capsys.readouterr().err
    )


def test_a_run_is_resumed_as_what_it_was(data: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    common = ["--data", str(data), "--device", "cpu", "--output_dir", str(out), "--save_epochs"]
    assert main([*common, "--num_epochs", "2"]) == 0
    before = (out / "pliant.json").read_bytes()
    last = max(out.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    (last / "complete.json").unlink()  # as if killed while it was written
    assert main([*common, "--num_epochs", "2"]) == 2
    assert "holds a run already: add --resume" in capsys.readouterr().err
    assert main([*common, "--num_epochs", "3", "--resume"]) == 2
    assert "begun with another config (num_epochs)" in capsys.readouterr().err
    assert main([*common, "--num_epochs", "2", "--resume", "--logging_steps", "1"]) == 0
    assert "resuming from checkpoint-" in capsys.readouterr().err
    assert (out / "pliant.json").read_bytes() == before
    assert json.loads((out / "pliant-train.json").read_text())["ended"]["resumed_at"] > 0
    assert main([*common, "--num_epochs", "2", "--resume"]) == 0
    assert "every step was trained before" in capsys.readouterr().out
    assert (out / "pliant.json").read_bytes() == before


@pytest.mark.parametrize(
    "flags",
    [
        ["--wrong"],
        ["--batch_size", "many"],
        ["--loss", "hinge"],
        ["--lora_targets", "q_proj"],
        ["--lora_rank", "2", "--lora_alpha", "nan"],
    ],
)
def test_a_mistyped_flag_is_one_line(flags: list[str], capsys: Any) -> None:
    assert main(flags) == 2 and capsys.readouterr().err.count("\n") == 1


def test_every_field_is_a_flag_with_its_docstring(capsys: Any) -> None:
    kinds = (CPXModelConfig, CPXTrainingConfig, CPXDatasetConfig)
    assert main(["--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in (f for kind in kinds for f in fields(kind)):
        assert f"--{field.name.replace('_', '-')} " in text
    assert "Prompts a step, on each device. [default: 32]" in text


def test_the_seeds_flags_are_read_as_the_seeds_write_them(monkeypatch: pytest.MonkeyPatch) -> None:
    settings: list[Any] = []
    monkeypatch.setattr(run, "train_scorer", lambda *configs: settings.extend(configs))
    flags = ["--class_weights", "1", "2.5", "--save_epochs", "--patience", "3", "--bias", "false"]
    assert main(flags) == 0
    model, training, _ = settings
    assert training.class_weights == (1.0, 2.5) and training.save_epochs and training.patience == 3
    assert model.bias is False and training.num_epochs == CPXTrainingConfig.num_epochs


def test_the_module_runs(root: Path) -> None:
    with Program("pliant.complexity", cwd=root) as running:
        assert running.stderr.read().startswith("error: no data")
        assert running.wait(timeout=60) == 2


LAUNCH = ["--num_processes", "2", "--num_machines", "1", "--main_process_port", "0"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no"]


def launched(*words: str, root: Path) -> subprocess.CompletedProcess[str]:
    """Two processes, as accelerate starts them. (With --cpu alone it starts one, which is not what
    its --num_processes says; on a machine without a GPU --multi_gpu is two on CPUs.)"""
    launch = [sys.executable, "-m", "accelerate.commands.launch", *LAUNCH]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *words], cwd=root, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_two_processes_of_accelerates_learn_what_one_does(
    data: Path, tmp_path: Path, root: Path
) -> None:
    common = ["--data", str(data), "--evaluation_data", str(data), "--device", "cpu"]
    common += ["--data_size", "48", "--num_epochs", "2", "--lora_rank", "2"]
    two, one = str(tmp_path / "two"), str(tmp_path / "one")
    command = ["--multi_gpu", "-m", "pliant.complexity", *common]
    done = launched(*command, "--batch_size", "4", "--output_dir", two, root=root)
    assert done.stdout.count("saved in") == 1
    assert main([*common, "--batch_size", "8", "--output_dir", one]) == 0
    model, _ = pliant.load("nano-s")
    scorers = [Complexity.from_pretrained(model, folder, name=folder[-3:]) for folder in (two, one)]
    first, second = (dict(scorer.named_parameters()) for scorer in scorers)
    assert first.keys() == second.keys()
    for name, parameter in first.items():
        assert torch.allclose(parameter, second[name], atol=1e-4), name


def test_sharding_where_there_is_none_is_refused(tmp_path: Path, root: Path) -> None:
    """In the environment that `accelerate launch --use_fsdp` gives its processes."""
    module = "tests.complexity.training.launched"
    parser = launch_command_parser()
    environment = prepare_multi_gpu_env(parser.parse_args([*LAUNCH, "--use_fsdp", "-m", module]))
    assert environment["ACCELERATE_USE_FSDP"] == "true"
    own = {k: v for k, v in environment.items() if k.startswith(("ACCELERATE_", "FSDP_"))}
    printed = run_two(module, str(tmp_path), cwd=root, CUDA_VISIBLE_DEVICES="", **own)
    refusal = "refused: FSDP was asked for, and accelerate"
    assert [text.count(refusal) for text in printed] == [2, 2]
