"""Run an answer's code with its tests in a process of its own, with limits, and read its report.

It guards against what a model in training writes: endless loops, memory, files, network, leaving
before the tests. It does not hold an attacker who studies it; run a stranger's code in a container
or a virtual machine.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import select
import signal
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
_NOT_STARTED = "unit_tests: the process of an answer did not start: "
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

    Its standard output and error are dropped. With `partial`, a failed test does not end the run.
    """
    if os.name != "posix":
        raise InvalidInput("unit_tests: answers run with limits that only Linux and macOS have")
    token = secrets.token_hex(16)
    request = {
        "token": token,
        "sources": list(sources),
        "tests": list(tests),
        "partial": partial,
        "cpu_seconds": math.ceil(seconds),
        "memory_mb": memory_mb,
        "file_mb": file_mb,
    }
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(
            tempfile.TemporaryDirectory(prefix="pliant-answer-", ignore_cleanup_errors=True)
        )
        stdin, stderr = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(2))
        stdout, report = _append_only(stack)
        # Lone surrogates, which a tokenizer may give, are no UTF-8: JSON escapes them.
        stdin.write(json.dumps({**request, "folder": folder}).encode())
        stdin.seek(0)
        status, limit = _run(folder, seconds, file_mb << 20, stdin, stdout, stderr)
        guards = _guards(stderr, token, status)
        return _read(guards, _events(report, token), len(tests), status, limit)


@cache
def kernel_guards() -> tuple[str, ...]:
    """What the kernel of this machine enforces on answers; without any, Python's audit alone does.

    "namespaces": there is no network device and no process but its own, and what an answer leaves
    behind dies with it. "files" (Landlock): it changes files only in its folder. "calls" (seccomp):
    it opens no sockets, starts no processes and signals none. All hold for C code, too.
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
        limit = _wait(process, seconds, folder, most)
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        status = process.wait()
    return status, limit


def _wait(process: subprocess.Popen[bytes], seconds: float, folder: str, most: int) -> str:
    """Wait for its end; the limit that it reached before, of time or of bytes in its folder.

    It stays unreaped where possible, so that its group is its own.
    """
    deadline = time.monotonic() + seconds
    with contextlib.ExitStack() as stack:
        poll: Any = None
        if hasattr(os, "pidfd_open"):
            descriptor = os.pidfd_open(process.pid)
            stack.callback(os.close, descriptor)
            poll = select.poll()
            poll.register(descriptor, select.POLLIN)
        while (left := deadline - time.monotonic()) > 0:
            if _ended(process, poll, min(left, _LOOK_EVERY)):
                return ""
            if _size(folder) > most:
                return f"more than {most >> 20} MB of files"
    return f"no end after {seconds:g} s"


def _ended(process: subprocess.Popen[bytes], poll: Any, seconds: float) -> bool:
    """Whether it ends within these seconds."""
    if poll is not None:
        return bool(poll.poll(math.ceil(seconds * 1000)))
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    return process.returncode is not None


def _size(folder: str) -> int:
    """The bytes that its files take."""
    size = 0
    for place, _, files in os.walk(folder):
        for file in files:
            with contextlib.suppress(OSError):
                size += os.lstat(os.path.join(place, file)).st_blocks * 512
    return size


def _guards(started: IO[bytes], token: str, status: int | None) -> tuple[str, ...]:
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
    reason = lines[-1] if lines else f"exit status {status}"
    raise PliantError(_NOT_STARTED + reason)


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
