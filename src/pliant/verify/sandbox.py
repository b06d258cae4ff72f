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
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

from pliant.errors import InvalidInput, PliantError

_SCRIPT = Path(__file__).with_name("sandbox_child.py")
_LONGEST_REPORT = 1 << 20  # bytes
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
    network: str
    """What keeps it off the network: "namespace" or "sockets blocked"."""

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
        stdin, stdout, stderr = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(3))
        # Lone surrogates, which a tokenizer may give, are no UTF-8: JSON escapes them.
        stdin.write(json.dumps({**request, "folder": folder}).encode())
        stdin.seek(0)
        status = _run(folder, seconds, stdin, stdout, stderr)
        events = _events(stdout, token)
        if not events:
            stderr.seek(0)
            lines = stderr.read(_LONGEST_REPORT).decode(errors="replace").splitlines()
            reason = lines[-1] if lines else f"exit status {status}"
            raise PliantError(f"unit_tests: the process of an answer did not start: {reason}")
    return _read(events, len(tests), status, seconds)


@cache
def network_block() -> str:
    """What keeps answers off the network on this machine: "namespace" or "sockets blocked".

    A namespace of its own is one that the kernel gives; where the system forbids it, Python's
    sockets refuse to connect, which code that calls the C library can get around.
    """
    return run_tests(["pass"], ["pass"]).network


def _run(
    folder: str, seconds: float, stdin: IO[Any], stdout: IO[Any], stderr: IO[Any]
) -> int | None:
    """The exit status, None if it did not end in time; it and its group are dead in any case."""
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
    ended = False
    try:
        ended = _wait(process, seconds)
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        status = process.wait()
    return status if ended else None


def _wait(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Whether it ended in time. It stays unreaped where possible, so that its group is its own."""
    if not hasattr(os, "pidfd_open"):
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True
    descriptor = os.pidfd_open(process.pid)
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        return bool(poll.poll(seconds * 1000))
    finally:
        os.close(descriptor)


def _events(report: IO[bytes], token: str) -> list[dict[str, Any]]:
    """The lines that have the token; an answer may have written others."""
    report.seek(0)
    events = []
    for line in report.read(_LONGEST_REPORT).splitlines():
        with contextlib.suppress(ValueError):
            event = json.loads(line)
            if isinstance(event, dict) and event.get("token") == token:
                events.append(event)
    return events


def _read(events: list[dict[str, Any]], tests: int, status: int | None, seconds: float) -> TestRun:
    broken = next((event["broken"] for event in events if "broken" in event), None)
    if broken is not None:
        raise InvalidInput(f"unit_tests: the reference's tests are no Python ({broken})")
    passed = {event["test"] for event in events if event.get("passed")}
    errors = [event["error"] for event in events if "error" in event]
    done = status == 0 and any("done" in event for event in events)
    if not done and not errors:
        errors = [
            f"no end after {seconds:g} s" if status is None else "it ended before its tests did"
        ]
    return TestRun(
        passed=tuple(i in passed for i in range(tests)),
        done=done,
        error=errors[0] if errors else "",
        network=events[0]["network"],
    )
