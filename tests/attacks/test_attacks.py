"""The attack in small: nothing is lost, nothing leaks, and no error is a bug."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from tests.attacks.attack import SMALL, attack
from tests.attacks.command_lines import GOOD
from tests.attacks.judged import fault
from tests.attacks.worker import Done
from tests.attacks.workplace import Workplace

from pliant.cli import app


def test_the_attack_in_small(tmp_path: Path) -> None:
    """`make attack` is the whole."""
    tallies = attack(tmp_path, SMALL)
    assert [each for tally in tallies for each in tally.wrong] == []
    tried = {tally.kind: tally.tried for tally in tallies}
    assert tried["command lines"] >= 100 and tried["server faults"] >= 20
    assert tried["API keys"] >= 30 and tried["kills"] == 10 and tried["forged files"] >= 25
    codes = tallies[0].codes
    assert codes[0] >= 10 and codes[2] >= 30, "the lines are neither all good nor all bad"


def test_every_command_is_attacked() -> None:
    assert set(GOOD) == set(app.names())


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
    ],
)
def test_what_is_wrong_is_seen(code: int, stderr: str, problem: str | None) -> None:
    seen = fault(Done(code, "", stderr, 0.0, False))
    assert seen is None if problem is None else problem in (seen or "")


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
