"""A run's folder: whose it is, and where it goes on."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from pliant.errors import InvalidInput
from pliant.gradients import GradientConfig, GradientsWarning
from pliant.gradients.runs.run import RECORD, Plan, prepare, run
from pliant.gradients.runs.texts import Texts
from pliant.loading import load
from pliant.training.checkpoint import mark_complete

TEXTS = Texts([{"input_ids": [1, 2], "labels": [1, 2]}])
PLAN = Plan.of("nano-s", "a.txt", TEXTS, GradientConfig(), {"max_steps": "3"}, None, "float32")


def begun(folder: Path, plan: Plan = PLAN, resume: bool = True) -> tuple[str | None, list[str]]:
    said: list[str] = []
    found = prepare(folder, plan, resume, said.append)
    return found and found.name, said


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again(tmp_path: Path) -> None:
    assert begun(tmp_path / "run", resume=False) == (None, [])
    assert begun(tmp_path / "run") == (None, ["no checkpoint yet: starting again"])


def test_it_goes_on_from_the_last_whole_checkpoint(tmp_path: Path) -> None:
    begun(tmp_path)
    for step in (2, 10, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
    mark_complete(tmp_path / "checkpoint-2")
    mark_complete(tmp_path / "checkpoint-10")
    found, said = begun(tmp_path)
    assert found == "checkpoint-10" and said[-1] == "resuming from checkpoint-10"
    assert said[0].startswith("checkpoint-12 was not finished")


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (replace(PLAN, content="other"), "begun with other data"),
        (replace(PLAN, lora=4), "begun with another lora"),
        (replace(PLAN, settings={}), r"another settings \(max_steps\)"),
    ],
)
def test_another_run_is_refused(tmp_path: Path, plan: Plan, said: str) -> None:
    begun(tmp_path)
    with pytest.raises(InvalidInput, match=said):
        begun(tmp_path, plan)
    assert begun(tmp_path, replace(PLAN, data="moved/a.txt"))[0] is None  # the same, elsewhere


@pytest.mark.parametrize("content", ["", "{", "[]", '{"plan": 3}'])
def test_a_damaged_record_is_said(tmp_path: Path, content: str) -> None:
    begun(tmp_path)
    (tmp_path / RECORD).write_text(content)
    with pytest.raises(InvalidInput, match="damaged; give another --out"):
        begun(tmp_path)


def test_scores_are_kept_by_the_pieces_they_are_of(tmp_path: Path) -> None:
    model, tokenizer = load("nano-s")
    pieces = [{"input_ids": [*range(40, 40 + n)], "labels": [*range(40, 40 + n)]} for n in (8, 9)]
    settings = {"max_steps": "2", "save_steps": "2", "logging_steps": "1", "use_cpu": "true"}
    made, config = Texts(pieces), GradientConfig(refresh=3)
    plan = Plan.of("nano-s", "a.txt", made, config, settings, None, "float32")
    with warnings.catch_warnings():
        warnings.simplefilter("error", GradientsWarning)
        run(model, tokenizer, made, tmp_path / "run", plan, say=lambda line: None)
    (saved,) = (tmp_path / "run" / "checkpoint-2" / "adapters").glob("*/*.json")
    assert '"kept"' in saved.read_text()


def test_a_run_that_ends_between_two_logs_is_told_whole(tmp_path: Path) -> None:
    model, tokenizer = load("nano-s")
    made = Texts([{"input_ids": [*range(40, 49)], "labels": [*range(40, 49)]}])
    settings = {"max_steps": "3", "logging_steps": "2", "use_cpu": "true"}
    config = GradientConfig(ratio=0.5)
    plan = Plan.of("nano-s", "a.txt", made, config, settings, None, "float32")
    ended = run(model, tokenizer, made, tmp_path / "run", plan, say=lambda line: None)
    assert (ended.tokens, ended.trained) == (3 * 8, 3 * 4)
    assert ended.last_loss == ended.last_loss != ended.first_loss
