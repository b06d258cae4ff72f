"""A file of rows that a job appends to one by one, so that a killed job can resume."""

from __future__ import annotations

import io
import json
import os
import threading
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pliant.data.rows import Row, json_lines
from pliant.errors import InvalidInput
from pliant.files import PRIVATE


class Journal:
    """A JSONL file of rows that are appended one by one and survive a kill.

    `row[key]` identifies a row, so that a restarted job sees what is done (`value in journal`).
    `add` hands the row to the system in one write, so a killed process loses no added row. (A power
    failure can, unless `durable=True` waits for the disk.) If a kill leaves the last line
    incomplete, opening the journal again drops it, with a warning. One process writes a journal at
    a time; its threads may share it.

    A file that does not begin with `start`, or has other rows than a journal, is refused and stays
    as it is. A new file that is `private` is readable by its owner alone.
    """

    def __init__(
        self,
        path: str | Path,
        key: str = "key",
        *,
        durable: bool = False,
        private: bool = False,
        start: str = "{",
    ) -> None:
        self.path, self.key, self.durable = Path(path), key, durable
        self._lock = threading.Lock()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.is_new = not self.path.exists()
            self._file = _open(self.path, private)
        except OSError as error:
            raise InvalidInput(f"{path}: cannot be written ({error.strerror})") from error
        try:
            _lock_or_refuse(self._file, self.path)
            content = self.path.read_bytes()
            _check_start(content, start, self.path)
            complete = _without_incomplete_line(content)
            rows = json_lines(io.BytesIO(complete), self.path)
            self._done = {self._key_of(row, f"{path}, line {at}") for at, row in rows}
            self.dropped = len(content) - len(complete)
            if self.dropped:
                os.ftruncate(self._file, len(complete))
            elif complete and not complete.endswith(b"\n"):
                _write_all(self._file, b"\n", self.path)
        except BaseException:
            os.close(self._file)
            raise
        if self.dropped:
            warnings.warn(
                f"{path}: dropped the incomplete last line ({self.dropped} bytes), left by a run "
                "that was killed",
                stacklevel=2,
            )

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row; in `rows` it replaces an older row with the same key."""
        name = self._key_of(row, "this row")
        line = (json.dumps(dict(row), ensure_ascii=False) + "\n").encode()
        with self._lock:
            _write_all(self._file, line, self.path)
            if self.durable:
                os.fsync(self._file)
            self._done.add(name)

    def rows(self) -> list[Row]:
        """The latest row of each key, in the order in which the keys were first added."""
        with self._lock:
            return list({row[self.key]: row for _, row in self._lines()}.values())

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __contains__(self, name: object) -> bool:
        return name in self._done

    def __len__(self) -> int:
        return len(self._done)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _key_of(self, row: Mapping[str, Any], where: str) -> str | int:
        name = row.get(self.key)
        if not isinstance(name, (str, int)):
            raise InvalidInput(f"{where}: no text or number under {self.key!r}, the journal's key")
        return name

    def _lines(self) -> Iterator[tuple[int, Row]]:
        with self.path.open("rb") as file:
            yield from json_lines(file, self.path)


def _lock_or_refuse(file: int, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # not on Windows: a second writer is not detected
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise InvalidInput(f"{path}: another process is writing it") from error


def _open(path: Path, private: bool) -> int:
    if path.exists() and not path.is_file():
        raise InvalidInput(f"{path}: is no file that rows can be added to")
    permissions = PRIVATE if private else 0o666  # less what the system withholds
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, permissions)


def _check_start(content: bytes, start: str, path: Path) -> None:
    """Refuse another file; of a journal that was killed at once, a part of `start` is left."""
    expected = start.encode()
    if not (content.startswith(expected) or expected.startswith(content)):
        raise InvalidInput(f"{path}: holds something else, which stays: name another file")


def _without_incomplete_line(content: bytes) -> bytes:
    """The content up to its last complete row, which may lack the end of its line."""
    tail = content[content.rfind(b"\n") + 1 :]
    try:
        complete = not tail or isinstance(json.loads(tail), dict)
    except (ValueError, RecursionError):
        complete = False
    return content if complete else content[: len(content) - len(tail)]


def _write_all(file: int, content: bytes, path: Path) -> None:
    """Write all of it or nothing: on a full disk, what was written is truncated again."""
    start = os.fstat(file).st_size
    try:
        written = os.write(file, content)
        while written < len(content):
            written += os.write(file, content[written:])
    except OSError as error:
        if os.fstat(file).st_size > start:
            os.ftruncate(file, start)
        raise InvalidInput(f"{path}: cannot be written ({error.strerror})") from error
