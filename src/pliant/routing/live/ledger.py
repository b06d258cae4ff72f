"""What was decided, what it cost and what it saved, in one sqlite file for threads and processes.

    with Ledger("ledger.sqlite") as ledger:
        ledger.report()

A prompt is stored as a salted hash, and as text only if the router's file says so. The salt lies in
the ledger: it prevents look-ups in tables of hashes, but whoever holds the ledger can test a guess.
"""

from __future__ import annotations

import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pliant.errors import CorruptFile, InvalidInput
from pliant.files import PRIVATE
from pliant.routing.live.decision import Decision, Reply
from pliant.routing.live.drift import Window, compare
from pliant.routing.prompts import Prompt, digest, text_of
from pliant.routing.router_file import Drift

SCHEMA = 1
_HEADER = 100  # bytes of sqlite's file format; the 18th says whether it writes ahead
PATIENCE = 60.0  # seconds that a writer waits for the others
_TABLES = """
CREATE TABLE about (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE decisions (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    at REAL NOT NULL,
    session TEXT,
    hash TEXT NOT NULL,
    prompt TEXT,
    model TEXT NOT NULL,
    wanted TEXT NOT NULL,
    score REAL,
    gain REAL,
    far INTEGER NOT NULL,
    kept INTEGER NOT NULL,
    reason TEXT NOT NULL,
    cost REAL NOT NULL,
    saved REAL NOT NULL,
    outcome TEXT NOT NULL,
    prompt_tokens INTEGER,
    answer_tokens INTEGER,
    ms REAL
);
CREATE TABLE windows (
    number INTEGER PRIMARY KEY,
    at REAL NOT NULL,
    distance REAL NOT NULL,
    bound REAL NOT NULL,
    mean REAL NOT NULL,
    size INTEGER NOT NULL
);
"""
# Connections that a forked child inherits from its parent: it may neither use nor close them.
_of_the_parent: list[sqlite3.Connection] = []


@dataclass(frozen=True)
class Totals:
    """The sums of a ledger."""

    decisions: int
    answered: int
    """Decisions that led to an answer; the others only chose, or failed."""
    failed: int
    models: dict[str, dict[str, float]]
    """By model: calls, share, cost, saved, tokens."""
    cost: float
    saved: float
    fell_over: int
    """Decisions for which another model stood in."""
    novel: int
    """Prompts unlike those that the router was fitted on."""
    from_session: int
    """Decisions that followed their session."""
    windows: tuple[Window, ...]
    """Of scores, each compared with the reference."""

    @property
    def drifted(self) -> tuple[Window, ...]:
        return tuple(window for window in self.windows if window.drifted)

    def as_dict(self) -> dict[str, Any]:
        windows = [{**vars(window), "drifted": window.drifted} for window in self.windows]
        return {**vars(self), "windows": windows}


class Ledger:
    """The decisions in one sqlite file; `None` keeps them in memory."""

    def __init__(
        self,
        path: str | Path | None,
        *,
        prompts: bool = False,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._prompts, self._now = prompts, now
        self._file = _File(None if path is None else Path(path))

    @property
    def path(self) -> Path | None:
        return self._file.path

    def record(
        self,
        prompt: Prompt,
        session: str | None,
        decision: Decision,
        cost: float,
        saved: float,
        drift: Drift | None = None,
    ) -> tuple[int, Window | None]:
        """Write a decision; returns its row, and the window of scores that it completed."""
        scored = decision.score is not None
        values = {
            "at": self._now(),
            "session": None if session is None else digest(session, self._file.salt),
            "hash": digest(prompt, self._file.salt),
            "prompt": text_of(prompt) if self._prompts else None,
            "model": decision.model,
            "wanted": decision.wanted,
            "score": decision.score,
            "gain": decision.gain,
            "far": decision.novel,
            "kept": decision.from_session,
            "reason": decision.reason,
            "cost": cost,
            "saved": saved,
            "outcome": "chosen",
        }
        names, marks = ", ".join(values), ", ".join("?" * len(values))
        with self._file.transaction() as base:
            cursor = base.execute(
                f"INSERT INTO decisions ({names}) VALUES ({marks})", tuple(values.values())
            )
            row = int(cursor.lastrowid or 0)
            window = self._window(base, drift) if scored and drift is not None else None
        return row, window

    def answered(self, row: int, reply: Reply) -> None:
        """Add the answer to a decision."""
        decision, used = reply.decision, reply.used
        values = {
            "model": decision.model,
            "reason": decision.reason,
            "cost": reply.cost,
            "saved": reply.saved,
            "outcome": "answered",
            "prompt_tokens": used.prompt_tokens,
            "answer_tokens": used.answer_tokens,
            "ms": used.ms,
        }
        self._file.update(row, values)

    def failed(self, row: int, why: str) -> None:
        """Mark a decision that no model answered: it cost nothing and saved nothing."""
        self._file.update(row, {"outcome": "failed", "cost": 0.0, "saved": 0.0, "reason": why})

    def report(self) -> Totals:
        """Calls, shares, costs, savings, fall-overs and drift over all decisions.

        Decisions without an answer count with the average cost of their model.
        """
        with self._file.reading() as base:
            by_model = base.execute(
                "SELECT model, COUNT(*), SUM(cost), SUM(saved), SUM(prompt_tokens), "
                "SUM(answer_tokens) FROM decisions WHERE outcome != 'failed' GROUP BY model"
            ).fetchall()
            (decisions, answered, failed, fell, novel, sticky) = base.execute(
                "SELECT COUNT(*), SUM(outcome = 'answered'), SUM(outcome = 'failed'), "
                "SUM(model != wanted AND outcome != 'failed'), SUM(far), SUM(kept) FROM decisions"
            ).fetchone()
            windows = base.execute(
                "SELECT number, distance, bound, mean, size FROM windows ORDER BY number"
            ).fetchall()
        served = sum(row[1] for row in by_model)
        models = {
            name: {
                "calls": calls,
                "share": calls / served,
                "cost": cost,
                "saved": saved,
                "prompt_tokens": prompt_tokens or 0,
                "answer_tokens": answer_tokens or 0,
            }
            for name, calls, cost, saved, prompt_tokens, answer_tokens in by_model
        }
        return Totals(
            decisions,
            answered or 0,
            failed or 0,
            models,
            float(sum(m["cost"] for m in models.values())),
            float(sum(m["saved"] for m in models.values())),
            fell or 0,
            novel or 0,
            sticky or 0,
            tuple(Window(*row) for row in windows),
        )

    def rows(self, limit: int | None = None) -> list[dict[str, Any]]:
        """The decisions, the latest first."""
        with self._file.reading() as base:
            cursor = base.execute(
                "SELECT * FROM decisions ORDER BY id DESC LIMIT ?",
                (-1 if limit is None else limit,),
            )
            names = [column[0] for column in cursor.description]
            return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- drift -----------------------------------------------------------------------------------

    def _window(self, base: sqlite3.Connection, drift: Drift) -> Window | None:
        """Compare a window with the reference as soon as its last score is written."""
        base.execute("UPDATE about SET value = value + 1 WHERE name = 'scored'")
        (scored,) = base.execute("SELECT value FROM about WHERE name = 'scored'").fetchone()
        if scored < drift.window:
            return None
        scores = base.execute(
            "SELECT score FROM decisions WHERE score IS NOT NULL ORDER BY id DESC LIMIT ?",
            (drift.window,),
        ).fetchall()
        (before,) = base.execute("SELECT COUNT(*) FROM windows").fetchone()
        window = compare(drift, [row[0] for row in scores], before + 1)
        base.execute("UPDATE about SET value = 0 WHERE name = 'scored'")
        base.execute(
            "INSERT INTO windows VALUES (?, ?, ?, ?, ?, ?)",
            (window.number, self._now(), window.distance, window.bound, window.mean, window.size),
        )
        return window


# --- the sqlite file -----------------------------------------------------------------------------


class _File:
    """The tables, and one connection for all threads of a process."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._lock = threading.RLock()
        self._open()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All of it or nothing; one writer at a time, across all processes."""
        with self.reading() as base:
            base.execute("BEGIN IMMEDIATE")
            try:
                yield base
            except BaseException:
                base.execute("ROLLBACK")
                raise
            base.execute("COMMIT")

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            if self._process != os.getpid() and self.path is not None:
                _of_the_parent.append(self._base)
                self._open()
            yield self._base

    def update(self, row: int, values: dict[str, Any]) -> None:
        """Change a decision; column names never come from a user."""
        changes = ", ".join(f"{name} = ?" for name in values)
        with self.transaction() as base:
            base.execute(f"UPDATE decisions SET {changes} WHERE id = ?", (*values.values(), row))

    def close(self) -> None:
        with self._lock:
            self._base.close()

    def _open(self) -> None:
        self._process = os.getpid()
        where = ":memory:" if self.path is None else str(self.path)
        try:
            if self.path is not None:
                _check_ours(self.path)
                _make_private(self.path)
            self._base = sqlite3.connect(
                where, timeout=PATIENCE, isolation_level=None, check_same_thread=False
            )
            if self.path is not None:
                _write_ahead(self._base)
            self._prepare()
        except sqlite3.OperationalError as error:
            raise InvalidInput(
                f"{where}: the ledger cannot be opened ({error}); name another file for it "
                "(ledger=PATH), or keep it in memory (ledger=None)"
            ) from error
        except sqlite3.DatabaseError as error:
            raise CorruptFile(f"{where}: not a ledger that Pliant wrote ({error})") from error

    def _prepare(self) -> None:
        """Make the tables in a new file; refuse a file that holds something else."""
        with self.transaction() as base:
            (version,) = base.execute("PRAGMA user_version").fetchone()
            tables = _tables_of(base)
            if version == 0 and not tables:
                for statement in _TABLES.split(";"):
                    base.execute(statement)
                about = [("salt", secrets.token_bytes(16)), ("scored", 0)]
                base.executemany("INSERT INTO about VALUES (?, ?)", about)
                base.execute(f"PRAGMA user_version = {SCHEMA}")
            elif not _is_ledger(tables):
                raise _foreign(self.path)
            elif version > SCHEMA:
                raise CorruptFile(
                    f"{self.path}: a ledger of schema {version}; this Pliant reads {SCHEMA}: "
                    "pip install -U pliant"
                )
            (salt,) = base.execute("SELECT value FROM about WHERE name = 'salt'").fetchone()
        self.salt: bytes = salt


def _check_ours(path: Path) -> None:
    """Refuse another database, which is only read and stays byte for byte as it is."""
    if not path.exists():
        return
    if not path.is_file():
        raise InvalidInput(f"{path}: is no file that a ledger can be in; name another file for it")
    with path.open("rb") as file:
        header = file.read(_HEADER)
    if not header:
        return
    has_log = path.with_name(f"{path.name}-wal").exists()
    # To read one that writes ahead, sqlite would create the log that it does without here.
    how = "mode=ro&immutable=1" if header[18:19] == b"\2" and not has_log else "mode=ro"
    address = f"{path.absolute().as_uri()}?{how}"
    with closing(sqlite3.connect(address, uri=True, timeout=PATIENCE)) as base:
        tables = _tables_of(base)
    if tables and not _is_ledger(tables):
        raise _foreign(path)


def _tables_of(base: sqlite3.Connection) -> set[str]:
    return {row[0] for row in base.execute("SELECT name FROM sqlite_master")}


def _is_ledger(tables: set[str]) -> bool:
    return {"about", "decisions", "windows"} <= tables


def _foreign(path: Path | None) -> CorruptFile:
    return CorruptFile(f"{path}: a database, but not a ledger that Pliant wrote")


def _make_private(path: Path) -> None:
    """Create a new ledger so that its owner alone reads it; sqlite's files beside it follow."""
    with suppress(OSError):  # it is there, or sqlite says why it cannot be made
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, PRIVATE))


def _write_ahead(base: sqlite3.Connection) -> None:
    """Readers and the writer do not wait for each other.

    sqlite does not wait for another process that switches a new file at the same moment.
    """
    until = time.monotonic() + PATIENCE
    while True:
        try:
            base.execute("PRAGMA journal_mode = WAL")
            base.execute("PRAGMA synchronous = NORMAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > until:
                raise
        time.sleep(0.01)
