"""The attack in small: nothing is lost, nothing leaks, and no error is a bug."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save
from tests.attacks import kills, servers
from tests.attacks.attack import SMALL, attack
from tests.attacks.command_lines import GOOD
from tests.attacks.judged import fault, not_finite
from tests.attacks.worker import Done
from tests.attacks.workplace import Workplace
from tests.test_credentials import FORMS, KEY

from pliant import options
from pliant.cli import app


def test_the_attack_in_small(tmp_path: Path) -> None:
    """`make attack` is the whole."""
    tallies = attack(tmp_path, SMALL)
    assert [each for tally in tallies for each in tally.wrong] == []
    tried = {tally.kind: tally.tried for tally in tallies}
    assert tried["command lines"] >= 100 and tried["server faults"] >= 20
    assert tried["API keys"] >= 30 and tried["kills"] == 10
    assert tried["forged files"] >= 13, "with the files as they are"
    assert tried["sealed forgeries"] >= 8 + 20, "with every file resealed as it is"
    assert tried["good lines"] >= 14 and len(tallies[1].interrupted) <= 5
    codes = tallies[1].codes
    assert codes[0] >= 10 and codes[2] >= 30, "the lines are neither all good nor all bad"


def test_every_command_is_attacked() -> None:
    assert set(GOOD) == set(app.names())


@pytest.mark.parametrize("command", GOOD)
def test_a_good_line_has_options_of_its_command(command: str) -> None:
    known = {option.name for option in options.of(app.command_function(command))}
    assert set(GOOD[command]) <= known


@pytest.mark.parametrize(
    ("code", "stderr", "problem"),
    [
        (0, "", None),
        (2, "error: --rows 0: give 1 or more", None),
        (2, "", "exit 2 without a word"),
        (1, "error: KeyError: 'a' (a bug in Pliant)", "exit 1"),
        (2, "error: 'NoneType' object has no attribute 'x'", "and says"),
        (-signal.SIGSEGV, "", "ended by SIGSEGV"),
        (-signal.SIGKILL, "", "hangs"),
        (130, "interrupted", "exit 130"),
    ],
)
def test_what_is_wrong_is_seen(code: int, stderr: str, problem: str | None) -> None:
    seen = fault(Done(code, "", stderr, 0.0, False))
    assert seen is None if problem is None else problem in (seen or "")


@pytest.mark.parametrize("stderr", ["interrupted", "training, step 1 of 900: loss 2\ninterrupted"])
@pytest.mark.parametrize("may_work", [False, True])
def test_a_command_that_ctrl_c_ends_is_right_if_it_works(stderr: str, may_work: bool) -> None:
    seen = fault(Done(130, "", stderr, 20.0, True), may_work=may_work)
    assert (seen is None) == (may_work and "step" in stderr), seen
    assert fault(Done(1, "", "training, step 1 of 9", 20.0, True), may_work=True) is not None


@pytest.mark.parametrize(
    ("stdout", "finite"),
    [("loss nan", False), ('{"a": -Infinity}', False), ("1.0 (Inf)", False), ("info 1", True)],
)
def test_a_result_that_is_no_number_is_seen(stdout: str, finite: bool) -> None:
    assert (not_finite(Done(0, stdout, "", 0.0, False)) is None) == finite
    assert not_finite(Done(2, stdout, "", 0.0, False)) is None


@pytest.mark.parametrize("form", FORMS)
def test_a_key_is_seen_in_every_form(form: str) -> None:
    repeated = FORMS[form](KEY)
    for text in (repeated, json.dumps({"answer": repeated})):
        assert servers._holds(f"before {text} after", repeated)
    assert not servers._holds("before *** after", repeated)


@pytest.mark.parametrize("name", ["new/config.json", "new/model.safetensors"])
def test_a_file_that_ends_in_the_middle_is_seen(name: str, tmp_path: Path) -> None:
    job, path = kills.JOBS["merge"], tmp_path / name
    path.parent.mkdir()
    whole = save({"a": np.ones(9)}) if path.suffix == ".safetensors" else b'{"a": 1}'
    path.write_bytes(whole)
    assert kills._damage(job, tmp_path) is None
    path.write_bytes(whole[:-3])
    assert kills._damage(job, tmp_path) == f"{path.name} is not whole"


def test_lost_answers_and_a_missing_result_are_seen(tmp_path: Path) -> None:
    job, done = kills.JOBS["label"], Done(0, "", "", 0.0, False)
    journal = tmp_path / "new.answers.jsonl"
    journal.write_bytes(b'{"key": 1}\n{"key": 2}\n{"ke')
    answers = kills._answers(tmp_path)
    assert len(answers) == 2
    assert kills._unfinished(job, done, answers, tmp_path) == "run again: no new.jsonl"
    (tmp_path / "new.jsonl").touch()
    assert kills._unfinished(job, done, answers, tmp_path) is None
    journal.write_bytes(b'{"key": 2}\n{"key": 3}\n')
    assert kills._unfinished(job, done, answers, tmp_path) == "1 answers are lost"
    failed = Done(2, "", "error: in use", 0.0, False)
    assert "in use" in (kills._unfinished(job, failed, answers, tmp_path) or "")


def test_a_lost_file_is_seen_and_comes_back(tmp_path: Path) -> None:
    place = Workplace(tmp_path)
    for folder in (tmp_path, tmp_path / "home"):
        for name in ("data", "hostile", "theirs", "ours"):
            (folder / name).mkdir(parents=True)
        (folder / "theirs" / "a").write_text("a")
        (folder / "theirs" / "b").write_text("b")
    before = place.state()
    (tmp_path / "theirs" / "a").unlink()
    (tmp_path / "theirs" / "b").write_text("c")
    assert place.reset(before) == ["theirs/a", "theirs/b"]
    assert (tmp_path / "theirs" / "b").read_text() == "b"
    assert place.reset(place.state()) == []
