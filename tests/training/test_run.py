"""A run's folder: which run it belongs to, and where that run resumes."""

from __future__ import annotations

import fcntl
import io
import json
import os
import re
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.training.test_checkpoint import everything, losses, model_with_adapters, same, trainer
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from pliant.errors import CorruptFile, InvalidInput
from pliant.files import unfinished_name
from pliant.training import AdapterCheckpoint
from pliant.training.arguments import training_arguments
from pliant.training.checkpoint import FiniteCheckpoint, last_complete, mark_complete, read_state
from pliant.training.folder import LOCK, RECORD, lock, read_record
from pliant.training.result import TrainingResult, ends_of
from pliant.training.run import TrainingRun

PLAN: dict[str, Any] = {
    "model": "nano-s",
    "data": "a.txt",
    "content": "1f",
    "config": {"ratio": 0.25, "mix": 0.2},
    "settings": {"max_steps": "3"},
    "lora": None,
}


def opened(folder: Path, resume: bool = True, **changes: Any) -> tuple[str | None, list[str]]:
    shared, messages = changes.pop("shared", False), list[str]()
    args = TrainingArguments(str(folder), use_cpu=True)
    plan = {**PLAN, **changes}
    run = TrainingRun(args, plan, resume=resume, shared=shared, say=messages.append)
    return run.checkpoint and run.checkpoint.name, messages


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again(tmp_path: Path) -> None:
    assert opened(tmp_path / "run", resume=False) == (None, [])
    assert opened(tmp_path / "run") == (None, ["no checkpoint yet: starting again"])


def logged(*entries: tuple[int, float]) -> list[dict[str, Any]]:
    return [{"step": step, "loss": loss} for step, loss in entries]


@pytest.mark.parametrize(
    ("history", "ends"),
    [
        (logged((10, 6.7)), None),  # ten steps, one mean
        (logged((10, 6.7), (11, 1.0)), None),  # and one step more, which is a single batch
        (logged((10, 6.0), (20, 4.0)), (6.0, 4.0)),
        (logged((10, 6.0), (20, 4.0), (22, 1.0)), (6.0, 3.5)),  # (10 x 4 + 2 x 1) / 12
        (logged(*((i, float(i)) for i in range(1, 20))), None),
        (logged(*((i, float(i)) for i in range(1, 21))), (5.5, 15.5)),
        ([], None),
    ],
    ids=["one log", "one step more", "two logs", "a short end", "19", "20", "nothing"],
)
def test_where_a_loss_began_and_ended_are_means_over_ten_steps(
    history: list[dict[str, Any]], ends: tuple[float, float] | None
) -> None:
    assert ends_of(history, "loss") == ends


def test_a_summary_says_what_it_cannot_tell() -> None:
    few = TrainingResult(10, 6.6954, 6.6954, None, None, 1.0, 0)
    assert str(few) == "10 steps: too few to tell whether the loss fell"
    assert few.cells()[1] == ["loss", "6.6954; 10 steps: too few to tell whether it fell"]
    enough = replace(few, steps=20, losses=(6.7, 6.1))
    assert str(enough) == "20 steps took the loss from 6.7000 to 6.1000"
    assert enough.cells()[1:3] == [["loss of the first steps", "6.7000"], ["of the last", "6.1000"]]


def test_it_resumes_from_the_last_complete_checkpoint(tmp_path: Path) -> None:
    opened(tmp_path)
    for step in (2, 10, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
    mark_complete(tmp_path / "checkpoint-2")
    mark_complete(tmp_path / "checkpoint-10")
    checkpoint, messages = opened(tmp_path)
    assert checkpoint == "checkpoint-10" and messages[-1] == "resuming from checkpoint-10"
    assert messages[0].startswith("checkpoint-12 was not finished")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"content": "other"}, "begun with other data"),
        ({"lora": 4}, "begun with another lora"),
        ({"settings": {"max_steps": "4", "report_to": "wandb"}}, r"another settings \(max_steps,"),
        ({"settings": {}}, r"another settings \(max_steps\)"),
        ({"config": {"ratio": 0.5, "mix": 0.2}}, r"another config \(ratio\)"),
    ],
)
def test_another_run_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    opened(tmp_path)
    (tmp_path / "checkpoint-2").mkdir()
    mark_complete(tmp_path / "checkpoint-2")
    with pytest.raises(InvalidInput, match=message):
        opened(tmp_path, **change)
    assert opened(tmp_path, data="moved/a.txt")[0] == "checkpoint-2"  # the same data, elsewhere
    machine = {**PLAN["settings"], "report_to": "wandb", "use_cpu": "true"}
    assert opened(tmp_path, settings=machine)[0] == "checkpoint-2"


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_a_run_that_had_not_begun_binds_nobody(tmp_path: Path, resume: bool, shared: bool) -> None:
    """It was killed before its first checkpoint, or refused for a setting that is corrected now."""
    unfinished = unfinished_name(tmp_path / RECORD)
    unfinished.touch()  # by a kill while the record was written
    opened(tmp_path, shared=shared, settings={"learning_rate": "-1"})
    (tmp_path / "runs").mkdir()  # by TensorBoard
    assert opened(tmp_path, resume=resume, shared=shared)[0] is None
    assert (read_record(tmp_path) or {})["plan"] == PLAN


def test_one_training_at_a_time_is_at_work_in_a_folder(tmp_path: Path) -> None:
    first = TrainingRun(TrainingArguments(str(tmp_path), use_cpu=True), PLAN)
    for resume in (False, True):
        with pytest.raises(InvalidInput, match="another training is at work in it"):
            opened(tmp_path, resume=resume)
    first.note(ended={})
    opened(tmp_path)
    del first
    (tmp_path / LOCK).touch()  # by a kill
    opened(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"pliant-train.json"}


def test_a_lock_that_was_removed_while_it_was_taken_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the next training would lock a new file, and two would be at work."""
    flock, removed = fcntl.flock, []

    def removed_by_the_one_before(handle: int, how: int) -> None:
        if not removed:
            removed.append((tmp_path / LOCK).unlink())
        flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", removed_by_the_one_before)
    release = lock(tmp_path)
    with pytest.raises(InvalidInput, match="another training is at work in it"):
        lock(tmp_path)
    release()
    assert not list(tmp_path.iterdir())


def test_a_model_without_checkpoints_is_a_run(tmp_path: Path) -> None:
    opened(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"model")
    with pytest.raises(InvalidInput, match="holds a run already"):
        opened(tmp_path, resume=False)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("neftune_noise_alpha=nan", "neftune_noise_alpha=nan: must be a finite number"),
        ("num_train_epochs=inf", "num_train_epochs=inf: must be a finite number"),
        (f"max_steps={10**30}", "must be at most"),
        ("seed=-1", "seed=-1: give 0 or more"),
        ("max_grad_norm=-1", "max_grad_norm=-1: give 0 or more"),
        ("adam_beta1=2", "can be made from these settings: Invalid beta"),
        ("adam_epsilon=-1", "can be made from these settings: Invalid epsilon"),
        ("optim_args=[", "no optimizer or schedule can be made"),
        ('lr_scheduler_kwargs={"num_cycles": 2}', "no optimizer or schedule can be made"),
        ("push_to_hub=true", "settled by pliant train"),
    ],
)
def test_a_setting_that_would_fail_later_is_refused_at_once(
    tmp_path: Path, setting: str, message: str
) -> None:
    name, _, value = setting.partition("=")
    with pytest.raises(InvalidInput, match=re.escape(message)):
        training_arguments(tmp_path, {name: value})


@pytest.mark.parametrize("name", ["hub_token", "push_to_hub_token"])
def test_a_token_is_written_into_no_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidInput, match="HF_TOKEN") as caught:
        training_arguments(tmp_path / "run", {name: "hf_verysecret"})
    assert "verysecret" not in str(caught.value) and not (tmp_path / "run").exists()


def test_a_token_among_the_arguments_is_refused_too(tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path / "run"), use_cpu=True, hub_token="hf_verysecret")
    with pytest.raises(InvalidInput, match="hub_token: .*HF_TOKEN") as caught:
        TrainingRun(args, PLAN)
    assert "verysecret" not in str(caught.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"plan": 3}'])
def test_a_damaged_record_is_an_error(tmp_path: Path, content: str) -> None:
    opened(tmp_path)
    (tmp_path / RECORD).write_text(content)
    with pytest.raises(InvalidInput, match="damaged; give another folder"):
        opened(tmp_path)


def test_a_folder_is_shared_only_where_the_part_allows_it(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("dear")
    with pytest.raises(InvalidInput, match="is not empty"):
        opened(tmp_path, resume=False)
    for _ in range(2):  # without checkpoints, another run replaces the first
        assert opened(tmp_path, resume=False, shared=True) == (None, [])
    (tmp_path / "checkpoint-2").mkdir()
    with pytest.raises(InvalidInput, match="holds a run already: add --resume"):
        opened(tmp_path, resume=False, shared=True)
    assert (tmp_path / "notes.txt").read_text() == "dear"


# --- a run ---------------------------------------------------------------------------------------


class Interrupt(TrainerCallback):
    """Ctrl-C, in the middle of the sixth step."""

    def on_step_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        if state.global_step == 5:
            os.kill(os.getpid(), signal.SIGINT)


def trained(
    folder: Path, *callbacks: TrainerCallback, resume: bool = False
) -> tuple[Trainer, list[str]]:
    """Twelve steps of a tiny model with two adapters, saved every four."""
    model, lines = model_with_adapters(), list[str]()
    args = trainer(model, folder).args

    def build() -> Trainer:
        return trainer(model, folder, AdapterCheckpoint(), *callbacks)

    run = TrainingRun(args, PLAN, resume=resume, say=lines.append)
    return run.train(build, describe=lambda logs: ", described"), lines


def test_ctrl_c_finishes_the_step_and_the_run_resumes_exactly(tmp_path: Path) -> None:
    uninterrupted, lines = trained(tmp_path / "uninterrupted")
    assert lines[0].startswith("training, step 1 of 12: loss ")
    assert ", described, about " in lines[0]
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "interrupted", Interrupt())
    assert signal.getsignal(signal.SIGINT) is handler
    assert last_complete(tmp_path / "interrupted") == tmp_path / "interrupted" / "checkpoint-6"
    resumed, lines = trained(tmp_path / "interrupted", resume=True)
    assert lines[0] == "resuming from checkpoint-6"
    assert same(everything(resumed.model), everything(uninterrupted.model))
    assert losses(resumed) == losses(uninterrupted)


def test_settings_that_exclude_each_other_leave_the_folder_free(tmp_path: Path) -> None:
    run = TrainingRun(TrainingArguments(str(tmp_path), use_cpu=True), PLAN)

    def build() -> Trainer:
        raise ValueError("this does not go with that")

    with pytest.raises(InvalidInput, match="settings do not go together: this does not go"):
        run.train(build)
    assert not list(tmp_path.iterdir())


def test_a_terminal_shows_a_bar_in_place_of_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    _, lines = trained(tmp_path)
    assert lines == [] and "12/12" in terminal.getvalue() and "described" in terminal.getvalue()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("weights", "its state cannot be read .*size mismatch for"),
        ("infinite optimizer", "the optimizer's exp_avg holds NaN or infinity"),
        ("total_flos", "trainer_state.json: not what the Trainer writes"),
        ("log_history", "log_history"),
    ],
)
def test_a_run_does_not_resume_from_an_edited_checkpoint(
    name: str, message: str, tmp_path: Path
) -> None:
    """Whose marker somebody has written anew: nothing is missing, and nothing of another size."""
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, Interrupt())
    checkpoint = tmp_path / "checkpoint-6"
    if name == "weights":
        tensors = load_file(checkpoint / "model.safetensors")
        key = next(key for key in tensors if key.endswith("weight"))
        save_file({**tensors, key: tensors[key][:1].clone()}, checkpoint / "model.safetensors")
    elif "optimizer" in name:
        state = torch.load(checkpoint / "optimizer.pt")
        state["state"][0]["exp_avg"] += float("nan")
        torch.save(state, checkpoint / "optimizer.pt")
    else:
        content = json.loads((checkpoint / "trainer_state.json").read_text())
        content[name] = ["x"] if name == "log_history" else "x"
        (checkpoint / "trainer_state.json").write_text(json.dumps(content))
    mark_complete(checkpoint)
    with pytest.raises(CorruptFile, match=message) as caught:
        trained(tmp_path, resume=True)
    assert "Remove this folder" in str(caught.value)


def test_a_run_does_not_go_on_with_weights_that_are_no_numbers(tmp_path: Path) -> None:
    args, control = TrainingArguments(str(tmp_path), use_cpu=True), TrainerControl()
    model = torch.nn.Linear(2, 2)
    for step, value in ((6, 1.0), (0, float("nan"))):  # at step 0 nothing was loaded
        model.weight.data[0, 1] = value
        FiniteCheckpoint().on_train_begin(
            args, TrainerState(global_step=step), control, model=model
        )
    with pytest.raises(CorruptFile, match=r"checkpoint-6: weight holds NaN or infinity"):
        FiniteCheckpoint().on_train_begin(args, TrainerState(global_step=6), control, model=model)


class NoMath(torch.Tensor):
    """Like the state of an 8-bit optimizer, which implements few operations."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls) -> NoMath:
        made: NoMath = torch.Tensor._make_wrapper_subclass(cls, (2, 2), dtype=torch.float32)  # type: ignore[attr-defined]
        return made

    @classmethod
    def __torch_dispatch__(cls, operation: Any, *_: Any) -> Any:
        raise NotImplementedError(str(operation))


def test_a_quantised_optimizer_state_is_taken_as_it_is(tmp_path: Path) -> None:
    args, state = TrainingArguments(str(tmp_path), use_cpu=True), TrainerState(global_step=6)
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.state[model.weight] = {"exp_avg": NoMath(), "exp_avg_sq": torch.ones(2)}
    event = {"model": model, "optimizer": optimizer}
    FiniteCheckpoint().on_train_begin(args, state, TrainerControl(), **event)
    optimizer.state[model.weight]["exp_avg_sq"][0] = float("inf")
    with pytest.raises(CorruptFile, match="the optimizer's exp_avg_sq holds NaN"):
        FiniteCheckpoint().on_train_begin(args, state, TrainerControl(), **event)


def test_the_best_metric_is_infinite_until_one_is_a_number(tmp_path: Path) -> None:
    """The Trainer writes that while each metric so far is NaN."""
    model = torch.nn.Linear(2, 2)
    args = TrainingArguments(
        str(tmp_path), use_cpu=True, metric_for_best_model="loss", greater_is_better=False
    )
    own = Trainer(model, args)
    own._determine_best_metric({"eval_loss": float("nan")}, None)
    own.state.stateful_callbacks = {"TrainerControl": TrainerControl().state()}
    own.state.save_to_json(str(tmp_path / "trainer_state.json"))
    assert read_state(tmp_path).best_metric == float("inf")
    own.state.best_metric = "x"
    own.state.save_to_json(str(tmp_path / "trainer_state.json"))
    with pytest.raises(CorruptFile, match="best_metric is 'x'"):
        read_state(tmp_path)
