"""Run an answer's code with its tests in a process of its own, with limits, and read its report.

It guards against what a model in training writes: endless loops, memory, files, network, leaving
before the tests. It does not hold an attacker who studies it; run a stranger's code in a container
or a virtual machine.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import secrets
import select
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

from pliant.errors import InvalidInput, PliantError

_SCRIPT = Path(__file__).with_name("sandbox_child.py")
_LONGEST_REPORT = 1 << 20  # bytes
_LOOK_EVERY = 0.1  # seconds from one look at the folder of an answer to the next
_LONGEST_START = 60.0  # seconds; an idle core needs 0.04
_ENTRY = 4096  # bytes that a file or folder takes at least, in most file systems
_NOT_STARTED = "unit_tests: the process of an answer did not start: "
_FOLDER = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_NOFOLLOW", 0)
_PATH = "/usr/local/bin:/usr/bin:/bin"


@dataclass(frozen=True)
class TestRun:
    """What an answer's code did in its tests."""

    __test__ = False  # not a class of tests, whatever pytest thinks of its name

    passed: tuple[bool, ...]
    """For each test whether it passed; a test that was not reached did not."""
    done: bool
    """Whether the tests ran to their end."""
    error: str
    """The first exception, or the limit that ended the run; empty if there was none."""
    guards: tuple[str, ...]
    """What the kernel enforces, beside Python's audit: "namespaces", "files", "calls"."""

    def __bool__(self) -> bool:
        return self.done and all(self.passed)


def run_tests(
    sources: Sequence[str],
    tests: Sequence[str],
    *,
    seconds: float = 10.0,
    memory_mb: int = 1024,
    file_mb: int = 16,
    partial: bool = False,
) -> TestRun:
    """Run the first of the sources that is Python, then the tests in its namespace.

    The seconds begin when its process has started. Its output is dropped. With `partial`, a failed
    test does not end the run.
    """
    if os.name != "posix":
        raise InvalidInput("unit_tests: answers run with limits that only Linux and macOS have")
    token = secrets.token_hex(16)
    request = {
        "token": token,
        "sources": list(sources),
        "tests": list(tests),
        "partial": partial,
        "cpu_seconds": math.ceil(seconds) + 5,  # were this process to die; else the time ends it
        "memory_mb": memory_mb,
        "file_mb": file_mb,
    }
    with contextlib.ExitStack() as stack:
        folder = tempfile.mkdtemp(prefix="pliant-answer-")
        stack.callback(_remove, folder)
        stdin, stderr = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(2))
        stdout, report = _append_only(stack)
        # Lone surrogates, which a tokenizer may give, are no UTF-8: JSON escapes them.
        stdin.write(json.dumps({**request, "folder": folder}).encode())
        stdin.seek(0)
        status, limit = _run(folder, seconds, file_mb << 20, stdin, stdout, stderr)
        guards = _guards(stderr, token, limit or f"exit status {status}")
        return _read(guards, _events(report, token), len(tests), status, limit)


@cache
def kernel_guards() -> tuple[str, ...]:
    """What the kernel of this machine enforces on answers; without any, Python's audit alone does.

    "namespaces": there is no network device and no process but its own, and what an answer leaves
    behind dies with it. "files" (Landlock): it creates, writes and removes files only in its
    folder. "calls" (seccomp): it opens no sockets, starts no processes and signals none. All hold
    for C code, too. None of them limits which files are read, nor the modes and times of files.
    """
    return run_tests(["pass"], ["pass"]).guards


def _append_only(stack: contextlib.ExitStack) -> tuple[IO[bytes], IO[bytes]]:
    """A file without a name, to append to and to read: an answer that can only append to it cannot
    read the token in an earlier line."""
    descriptor, path = tempfile.mkstemp(prefix="pliant-report-")
    reading = stack.enter_context(os.fdopen(descriptor, "rb"))
    appending = os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND), "ab", buffering=0)
    stack.callback(appending.close)
    os.remove(path)
    return appending, reading


def _run(
    folder: str, seconds: float, most: int, stdin: IO[Any], stdout: IO[Any], stderr: IO[Any]
) -> tuple[int, str]:
    """The exit status, and the limit that ended it; it and its group are dead in any case."""
    environment = {
        "HOME": folder,
        "TMPDIR": folder,
        "PATH": _PATH,
        "LANG": "C.UTF-8",
        "PYTHONHASHSEED": "0",  # the same verdict each time
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",  # else each thread of numpy takes from the memory
    }
    process = subprocess.Popen(
        [sys.executable, "-s", "-P", str(_SCRIPT)],
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        cwd=folder,
        env=environment,
        start_new_session=True,
    )
    limit = ""
    try:
        limit = _wait(process, seconds, folder, most, stderr)
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        status = process.wait()
    return status, limit


def _wait(
    process: subprocess.Popen[bytes], seconds: float, folder: str, most: int, started: IO[bytes]
) -> str:
    """Wait for its end; the limit that it reached, of time or of bytes in its folder.

    The time begins when it has started. It stays unreaped where possible, so that its group is
    its own.
    """
    limit = f"it had not started after {_LONGEST_START:g} s"
    deadline, running = time.monotonic() + _LONGEST_START, False
    with contextlib.ExitStack() as stack:
        poll = _poll(process, stack)
        while (left := deadline - time.monotonic()) > 0:
            if not running and os.fstat(started.fileno()).st_size:
                limit = f"no end after {seconds:g} s"
                deadline, running = time.monotonic() + seconds, True
                continue
            ended = _ended(process, poll, min(left, _LOOK_EVERY if running else _LOOK_EVERY / 10))
            excess = _excess(folder, most)
            if ended or excess:
                return excess
    return limit


def _poll(process: subprocess.Popen[bytes], stack: contextlib.ExitStack) -> Any:
    """What waits for its end without reaping it; None where the system or its kernel cannot."""
    if not hasattr(os, "pidfd_open"):
        return None
    try:
        descriptor = os.pidfd_open(process.pid)
    except OSError:  # an old kernel, or a container that refuses it
        return None
    stack.callback(os.close, descriptor)
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return poll


def _ended(process: subprocess.Popen[bytes], poll: Any, seconds: float) -> bool:
    """Whether it ends within these seconds."""
    if poll is not None:
        return bool(poll.poll(math.ceil(seconds * 1000)))
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    return process.returncode is not None


def _excess(folder: str, most: int) -> str:
    """What is too much in the folder, if anything: the bytes that it takes, or its depth."""
    size, folders = 0, [folder]
    while folders:
        try:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    size += _size(entry)
                    if size > most:
                        return f"more than {most >> 20} MB of files"
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
        except OSError as error:  # the answer may have removed it, or may still do
            if error.errno == errno.ENAMETOOLONG:
                return "folders nested deeper than a path may be long"
    return ""


def _size(entry: os.DirEntry[str]) -> int:
    try:
        return max(_ENTRY, entry.stat(follow_symlinks=False).st_blocks * 512)
    except FileNotFoundError:
        return 0


def _remove(folder: str) -> None:
    """Remove the folder, however deep it is, and never raise; what cannot be removed stays.

    Each folder moves to the top before it is emptied: a path from there may be too long.
    """
    with contextlib.suppress(OSError):
        if not os.path.islink(folder):
            os.chmod(folder, 0o700)
        top = os.open(folder, _FOLDER)
        try:
            waiting = _empty(top, top)
            while waiting:
                name = waiting.pop()
                with contextlib.suppress(OSError):
                    os.chmod(name, 0o700, dir_fd=top)
                    inner = os.open(name, _FOLDER, dir_fd=top)
                    try:
                        waiting += _empty(inner, top)
                    finally:
                        os.close(inner)
                    os.rmdir(name, dir_fd=top)
        finally:
            os.close(top)
        os.rmdir(folder)


def _empty(inner: int, top: int) -> list[str]:
    """Remove the files of an open folder, and move its folders to the top: their names there."""
    moved = []
    for name in os.listdir(inner):
        with contextlib.suppress(OSError):
            if not stat.S_ISDIR(os.stat(name, dir_fd=inner, follow_symlinks=False).st_mode):
                os.remove(name, dir_fd=inner)
                continue
            new = secrets.token_hex(8)
            os.chmod(name, 0o700, dir_fd=inner)  # to move a folder is to write to it
            os.rename(name, new, src_dir_fd=inner, dst_dir_fd=top)
            moved.append(new)
    return moved


def _guards(started: IO[bytes], token: str, end: str) -> tuple[str, ...]:
    """The kernel's guards, of a process that got as far as to start the answer."""
    for event in _events(started, token):
        if "broken" in event:
            raise InvalidInput(
                f"unit_tests: the reference's tests are no Python ({event['broken']})"
            )
        if "failed" in event:
            raise PliantError(_NOT_STARTED + event["failed"])
        return tuple(event["guards"])
    started.seek(0)
    lines = started.read(_LONGEST_REPORT).decode(errors="replace").splitlines()
    raise PliantError(_NOT_STARTED + (lines[-1] if lines else end))


def _events(report: IO[bytes], token: str) -> list[dict[str, Any]]:
    """The lines that have the token; an answer may have written others."""
    report.seek(0)
    events = []
    for line in report.read(_LONGEST_REPORT).splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            event = json.loads(line)
            if isinstance(event, dict) and event.get("token") == token:
                events.append(event)
    return events


def _read(
    guards: tuple[str, ...], events: list[dict[str, Any]], tests: int, status: int, limit: str
) -> TestRun:
    passed = {event["test"] for event in events if event.get("passed")}
    errors = [event["error"] for event in events if "error" in event]
    done = status == 0 and not limit and any("done" in event for event in events)
    if not errors and not (done and len(passed) == tests):
        errors = [limit or "it ended before its tests did"]
    return TestRun(
        passed=tuple(i in passed for i in range(tests)),
        done=done,
        error=errors[0] if errors else "",
        guards=guards,
    )
