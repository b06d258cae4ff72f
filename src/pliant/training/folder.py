"""The folder of a training run: its record, its lock, and what may begin or resume in it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pliant.errors import InvalidInput
from pliant.files import check_writable, leftovers
from pliant.training.checkpoint import checkpoints

RECORD = "pliant-train.json"
LOCK = ".pliant-train.lock"
UNBEGUN = {RECORD, LOCK, "runs", "log.jsonl"}
"""What is in a run's folder before its first checkpoint: its record, and logs."""
OF_THE_MACHINE = {"use_cpu", "report_to", "run_name", "project"}
"""Settings that change no loss beyond rounding: a resumed run may change them."""


def lock(folder: Path) -> Callable[[], None]:
    """Lock a folder, unless another training is at work in it: the two would mix their checkpoints.
    Returns what unlocks it; the end of the process does, too."""
    try:
        import fcntl
    except ImportError:  # Windows
        return lambda: None
    path = folder / LOCK
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise InvalidInput(
            f"{folder}: another training is at work in it: wait for its end, or give another folder"
        ) from None
    except OSError:  # a file system without locks
        pass
    if not _is_open_at(path, handle):  # the training before removed it in between
        os.close(handle)
        return lock(folder)

    def release() -> None:
        path.unlink(missing_ok=True)
        os.close(handle)

    return release


def _is_open_at(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def read_record(folder: Path) -> dict[str, Any] | None:
    """What `pliant-train.json` holds, if there is one."""
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_bytes())
        assert isinstance(content["plan"], dict)
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise InvalidInput(f"{path}: damaged; give another folder") from error
    return dict(content)


def check_folder(folder: Path, resume: bool, *, shared: bool = False) -> dict[str, Any] | None:
    """Refuse a folder that no run may begin or resume in; returns the record of its run."""
    check_writable(folder)
    record = read_record(folder)
    if record is None and not shared:
        _refuse_other_files(folder)
    if not resume and has_begun(folder, shared=shared) and (record is not None or shared):
        raise InvalidInput(f"{folder}: holds a run already: add --resume, or give another folder")
    return record


def has_begun(folder: Path, *, shared: bool = False) -> bool:
    """Whether a run in this folder got so far that something would be lost. Killed before its first
    checkpoint, or refused for its settings, it leaves its record and logs alone."""
    if shared or not folder.is_dir():
        return bool(checkpoints(folder))
    return any(path.name not in UNBEGUN for path in _contents(folder))


def _contents(folder: Path) -> set[Path]:
    """Without the lock, and a record that a kill left unfinished."""
    return set(folder.iterdir()) - {folder / LOCK} - set(leftovers(folder / RECORD))


def how_it_resumes(folder: Path, record: Any, checkpoint: Path | None) -> str:
    if checkpoint is not None:
        return f"resuming from {checkpoint.name}"
    if record is None:
        return f"{folder} holds no run yet: starting one"
    return "no checkpoint yet: starting again"


def _refuse_other_files(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise InvalidInput(f"{folder} is a file: give a folder")
    if folder.is_dir() and _contents(folder):
        what = "checkpoints of another training" if checkpoints(folder) else "something else"
        raise InvalidInput(f"{folder}: is not empty (it holds {what}): give another folder")


def refuse_another_plan(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    for key, value in before.items():
        if now.get(key) == value or key == "data":
            continue
        if isinstance(value, dict) and isinstance(now.get(key), dict):
            names = {k for k in value.keys() | now[key].keys() if value.get(k) != now[key].get(k)}
            if key == "settings" and names <= OF_THE_MACHINE:
                continue
            key = f"{key} ({', '.join(sorted(names))})"
        what = "other data" if key == "content" else f"another {key}"
        raise InvalidInput(
            f"{folder}: this run was begun with {what}: resume it as it was begun, or give "
            "another folder"
        )
