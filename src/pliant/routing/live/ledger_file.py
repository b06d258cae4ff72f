"""The sqlite file of a ledger: its tables, and one connection for all threads of a process."""

from __future__ import annotations

import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from pliant.errors import CorruptFile, InvalidInput
from pliant.files import PRIVATE

SCHEMA = 2
_HEADER = 100  # bytes of sqlite's file format; the 18th says whether it writes ahead
PATIENCE = 60.0  # seconds that a writer waits for the others
_DECISIONS = """
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
_ANSWERS = """
CREATE TABLE explorations (
    decision INTEGER PRIMARY KEY,
    messages TEXT,
    "group" TEXT,
    failures TEXT
);
CREATE TABLE answers (
    decision INTEGER NOT NULL,
    model TEXT NOT NULL,
    answer TEXT,
    cost REAL NOT NULL,
    extra INTEGER NOT NULL,
    grade REAL,
    PRIMARY KEY (decision, model)
) WITHOUT ROWID;
CREATE INDEX decisions_by_hash ON decisions (hash);
"""
_TABLES = {1: _DECISIONS, 2: _ANSWERS}
"""What each schema adds to the one before it."""
# Connections that a forked child inherits from its parent: it may neither use nor close them.
_of_the_parent: list[sqlite3.Connection] = []


class LedgerFile:
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
        """Make the tables that a new or an older file lacks; refuse one of something else."""
        with self.transaction() as base:
            (version,) = base.execute("PRAGMA user_version").fetchone()
            tables = _tables_of(base)
            is_new = version == 0 and not tables
            if not is_new and not _is_ledger(tables):
                raise _foreign(self.path)
            if version > SCHEMA:
                raise CorruptFile(
                    f"{self.path}: a ledger of schema {version}; this Pliant reads {SCHEMA}: "
                    "pip install -U pliant"
                )
            for schema in range(version + 1, SCHEMA + 1):
                for statement in _TABLES[schema].split(";"):
                    base.execute(statement)
            if is_new:
                about = [("salt", secrets.token_bytes(16)), ("scored", 0)]
                base.executemany("INSERT INTO about VALUES (?, ?)", about)
            if version < SCHEMA:
                base.execute(f"PRAGMA user_version = {SCHEMA}")
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
