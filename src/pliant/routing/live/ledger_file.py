"""The sqlite file behind a ledger: its tables, and one writer at a time."""

from __future__ import annotations

import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pliant.errors import CorruptFile, InvalidInput

SCHEMA = 1
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


class LedgerFile:
    """One connection for all threads of a process."""

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
            tables = {row[0] for row in base.execute("SELECT name FROM sqlite_master")}
            if version == 0 and not tables:
                for statement in _TABLES.split(";"):
                    base.execute(statement)
                about = [("salt", secrets.token_bytes(16)), ("scored", 0)]
                base.executemany("INSERT INTO about VALUES (?, ?)", about)
                base.execute(f"PRAGMA user_version = {SCHEMA}")
            elif "decisions" not in tables:
                raise CorruptFile(f"{self.path}: a database, but not a ledger that Pliant wrote")
            elif version > SCHEMA:
                raise CorruptFile(
                    f"{self.path}: a ledger of schema {version}; this Pliant reads {SCHEMA}: "
                    "pip install -U pliant"
                )
            (salt,) = base.execute("SELECT value FROM about WHERE name = 'salt'").fetchone()
        self.salt: bytes = salt


@contextmanager
def carried(old: Path, new: Path) -> Iterator[None]:
    """In this context the ledgers of the folder `old` are in `new` as well, which may replace it.

    They are hard links, so a process that has a ledger open goes on writing into the one that is
    there afterwards. Where the file system has no hard links, the content is copied.
    """
    connections: list[sqlite3.Connection] = []
    try:
        for ledger in old.glob("*.sqlite"):
            base = sqlite3.connect(ledger, timeout=PATIENCE)
            connections.append(base)
            # Reading creates its log beside it, which stays as long as this connection is open.
            base.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
            try:
                for part in old.glob(f"{ledger.name}*"):
                    os.link(part, new / part.name)
            except OSError:
                _copy(base, new / ledger.name)
        yield
    finally:
        for base in connections:
            base.close()


def _copy(base: sqlite3.Connection, to: Path) -> None:
    for part in to.parent.glob(f"{to.name}*"):
        part.unlink()
    copy = sqlite3.connect(to)
    base.backup(copy)
    copy.close()


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
