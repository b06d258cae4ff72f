"""The ledger: every decision once, whoever writes it, and no prompt unless it is asked to."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pliant.errors import CorruptFile, InvalidInput
from pliant.routing.backends import Used
from pliant.routing.live import drift
from pliant.routing.live.decision import Decision, Reply
from pliant.routing.live.ledger import Ledger

SECRET = "my private question"


def decision(model: str = "a", score: float | None = 0.5, **changes: Any) -> Decision:
    stated = {"gain": 0.1, "reason": "because", "wanted": model, **changes}
    return Decision(model=model, score=score, **stated)


def reply(made: Decision, cost: float, saved: float) -> Reply:
    used = Used(calls=1, prompt_tokens=3, answer_tokens=2, ms=1.0)
    return Reply("text", made, cost, saved, "calls", used, ("text",))


def everything(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.iterdir())


def test_decisions_add_up() -> None:
    with Ledger(None) as ledger:
        row, _ = ledger.record("p", None, decision("a"), 1.0, 4.0)
        ledger.answered(row, reply(decision("a"), 2.0, 8.0))
        ledger.record("p", "s", decision("b", from_session=True), 5.0, 0.0)
        row, _ = ledger.record("p", None, decision("a", novel=True), 1.0, 4.0)
        ledger.answered(row, reply(decision("b", wanted="a"), 5.0, 0.0))
        row, _ = ledger.record("p", None, decision("a"), 1.0, 4.0)
        ledger.failed(row, "nobody is there")
        totals = ledger.report()
    assert (totals.decisions, totals.answered, totals.failed) == (4, 2, 1)
    assert (totals.fell_over, totals.novel, totals.from_session) == (1, 1, 1)
    assert (totals.cost, totals.saved) == (12.0, 8.0)
    assert totals.models["a"] == {
        "calls": 1,
        "share": pytest.approx(1 / 3),
        "cost": 2.0,
        "saved": 8.0,
        "prompt_tokens": 3,
        "answer_tokens": 2,
    }
    assert totals.models["b"]["calls"] == 2


def test_an_empty_ledger_adds_up_to_nothing() -> None:
    with Ledger(None) as ledger:
        totals = ledger.report()
    assert (totals.decisions, totals.cost, totals.models, totals.windows) == (0, 0.0, {}, ())


def test_no_prompt_and_no_session_is_kept_unless_it_is_asked_for(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.record(SECRET, "the session of bob", decision(), 1.0, 0.0)
        (row,) = ledger.rows()
        assert row["prompt"] is None and len(row["hash"]) == 32
    assert SECRET.encode() not in everything(tmp_path) and b"bob" not in everything(tmp_path)
    with Ledger(tmp_path / "ledger.sqlite", prompts=True) as ledger:
        ledger.record(SECRET, None, decision(), 1.0, 0.0)
        assert [row["prompt"] for row in ledger.rows()] == [SECRET, None]
        assert len({row["hash"] for row in ledger.rows()}) == 1, "the salt lasts"


def test_two_ledgers_hash_a_prompt_differently() -> None:
    hashes = set()
    for _ in range(2):
        with Ledger(None) as ledger:
            ledger.record(SECRET, None, decision(), 1.0, 0.0)
            hashes.add(ledger.rows()[0]["hash"])
    assert len(hashes) == 2


def test_threads_write_each_decision_once(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.sqlite") as ledger:

        def write(i: int) -> None:
            row, _ = ledger.record(f"p{i}", None, decision(), 1.0, 1.0)
            ledger.answered(row, reply(decision(), float(i), 1.0))

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(write, range(200)))
        totals = ledger.report()
    assert totals.answered == 200 and totals.cost == sum(range(200))


WRITER = """
import sys
from pliant.routing.live.decision import Decision
from pliant.routing.live.drift import Drift
from pliant.routing.live.ledger import Ledger
reference = Drift(edges=[0.5], below=[0.5], n=1000, window=50)
with Ledger(sys.argv[1]) as ledger:
    for i in range(100):
        made = Decision("a", (i % 10) / 10, 0.1, "r", "a")
        ledger.record(f"{sys.argv[2]} {i}", None, made, 1.0, 2.0, reference)
"""


def test_processes_that_begin_at_once_share_a_new_ledger(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    line = [sys.executable, "-c", WRITER, str(path)]
    running = [subprocess.Popen([*line, str(i)]) for i in range(3)]
    assert [process.wait() for process in running] == [0] * 3
    with Ledger(path) as ledger:
        totals = ledger.report()
        assert totals.decisions == 300 and totals.saved == 600.0
        assert [window.number for window in totals.windows] == list(range(1, 7))
        assert len({row["hash"] for row in ledger.rows()}) == 300


def test_a_forked_child_writes_by_a_connection_of_its_own(tmp_path: Path) -> None:
    import os

    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.record("parent", None, decision(), 1.0, 0.0)
        child = os.fork()
        if child == 0:
            try:
                ledger.record("child", None, decision(), 1.0, 0.0)
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
        ledger.record("parent again", None, decision(), 1.0, 0.0)
        assert ledger.report().decisions == 3


def test_a_window_is_looked_at_once_and_by_whoever_fills_it() -> None:
    reference = drift.reference([i / 100 for i in range(100)], window=20)
    with Ledger(None) as ledger:
        result = [
            ledger.record("p", None, decision(score=0.9 if i % 2 else None), 1.0, 0.0, reference)[1]
            for i in range(80)
        ]
        filled = [i for i, window in enumerate(result) if window is not None]
        assert filled == [39, 79], "only what was scored counts"
        assert all(window.size == 20 and window.drifted for window in ledger.report().windows)
        assert len(ledger.report().drifted) == 2


@pytest.mark.parametrize("content", [b"not a database at all " * 50, None])
def test_a_file_that_is_something_else_is_refused(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    if content is None:
        base = sqlite3.connect(path)
        base.execute("CREATE TABLE mine (x)")
        base.commit()
        base.close()
    else:
        path.write_bytes(content)
    before = path.read_bytes()
    with pytest.raises(CorruptFile, match="not a ledger"):
        Ledger(path)
    if content is not None:
        assert path.read_bytes() == before


def test_a_ledger_of_a_later_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    Ledger(path).close()
    base = sqlite3.connect(path)
    base.execute("PRAGMA user_version = 99")
    base.close()
    with pytest.raises(CorruptFile, match="schema 99"):
        Ledger(path)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no/such/folder.*ledger=None"):
        Ledger(tmp_path / "no/such/folder/ledger.sqlite")


@pytest.mark.parametrize("journal_mode", ["delete", "wal"])
@pytest.mark.parametrize("is_open", [False, True])
def test_a_foreign_database_stays_byte_for_byte(
    tmp_path: Path, journal_mode: str, is_open: bool
) -> None:
    path = tmp_path / "other.db"
    base = sqlite3.connect(path)
    base.execute(f"PRAGMA journal_mode = {journal_mode}")
    base.execute("CREATE TABLE decisions (mine)")  # even if one of its tables has our name
    base.commit()
    if not is_open:
        base.close()

    def content() -> dict[str, bytes]:
        # The index of the log, which sqlite keeps in shared memory, holds the readers' locks.
        names = sorted(each for each in tmp_path.iterdir() if not each.name.endswith("-shm"))
        return {each.name: each.read_bytes() for each in names}

    before = content()
    with pytest.raises(CorruptFile, match="not a ledger that Pliant wrote"):
        Ledger(path)
    assert content() == before
    base.close()


def test_a_ledger_is_its_owners(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.record("a", None, decision(), 1.0, 0.0)
        modes = {each.name: each.stat().st_mode & 0o777 for each in tmp_path.iterdir()}
    assert len(modes) == 3 and set(modes.values()) == {0o600}


def test_a_ledger_is_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InvalidInput, match="is no file"):
        Ledger(tmp_path / "pipe")
