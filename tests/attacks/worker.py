"""A process that has paid for every import, and forks a new one for each `pliant` command.

What is forked is a program of its own: it has its own folder, environment, stdin and memory limit,
can be killed, and leaves no state to the next. Unlike a program's words, these may hold anything.
"""

from __future__ import annotations

import io
import json
import os
import pkgutil
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
HEAVY = (
    "datasets",
    "peft",
    "pyarrow.parquet",
    "sklearn.linear_model",
    "torch.distributed",
    "transformers.trainer",
    "transformers.models.llama.modeling_llama",
)
MEMORY = 16 * 2**30
"""Bytes of address space of a command: torch alone takes three gigabytes of it."""
PATIENCE = 60
"""Seconds from Ctrl-C to a kill."""


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    """Of a killed one, the negative number of the signal."""
    stdout: str
    stderr: str
    seconds: float
    interrupted: bool
    """It ran into its limit and got Ctrl-C."""


@dataclass
class Worker:
    """Runs commands one at a time; from several threads, too."""

    environment: Mapping[str, str] = field(default_factory=dict)

    def __enter__(self) -> Worker:
        words = [sys.executable, "-m", "tests.attacks.worker"]
        self.process = subprocess.Popen(
            words,
            cwd=ROOT,
            env={**os.environ, **self.environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.lock = threading.Lock()
        return self

    def __exit__(self, *error: object) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(timeout=PATIENCE)
        self.process.stdout.close()

    def run(
        self,
        words: Sequence[str],
        cwd: Path,
        *,
        stdin: bytes = b"",
        environment: Mapping[str, str] | None = None,
        limit: float = 300,
        kill_after: float | None = None,
    ) -> Done:
        """Run `pliant WORD...`; Ctrl-C after `limit` seconds, SIGKILL after `kill_after`."""
        job = {"words": list(words), "cwd": str(cwd), "stdin": stdin.decode("latin-1")}
        job |= {"environment": dict(environment or {}), "limit": limit, "kill_after": kill_after}
        assert self.process.stdin is not None and self.process.stdout is not None
        with self.lock:
            print(json.dumps(job), file=self.process.stdin, flush=True)
            return Done(**json.loads(self.process.stdout.readline()))


def main() -> None:
    """Answer a job on each line of stdin with a line on stdout."""
    import pliant

    for name in HEAVY:
        import_module(name)
    for module in pkgutil.walk_packages(pliant.__path__, "pliant."):
        if not module.name.endswith("__main__"):
            import_module(module.name)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


def answer(job: Mapping[str, Any]) -> dict[str, Any]:
    with (
        tempfile.TemporaryFile() as stdin,
        tempfile.TemporaryFile() as stdout,
        tempfile.TemporaryFile() as stderr,
    ):
        stdin.write(job["stdin"].encode("latin-1"))
        stdin.seek(0)
        started = time.monotonic()
        child = os.fork()
        if child == 0:
            _become(job, [stdin.fileno(), stdout.fileno(), stderr.fileno()])
        code, interrupted = _ended(child, job["limit"], job["kill_after"])
        seconds = time.monotonic() - started
        texts = []
        for file in (stdout, stderr):
            file.seek(0)
            texts.append(file.read().decode("utf-8", errors="replace"))
    result = {"code": code, "stdout": texts[0], "stderr": texts[1]}
    return result | {"seconds": seconds, "interrupted": interrupted}


def _become(job: Mapping[str, Any], streams: list[int]) -> None:
    """In the forked process: run the command and end."""
    code = 1
    try:
        os.setsid()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        # As a program that starts in a UTF-8 locale, which Python's own streams are strict about.
        sys.stdin = io.TextIOWrapper(io.FileIO(0), encoding="utf-8")
        sys.stdout = io.TextIOWrapper(io.FileIO(1, "w"), encoding="utf-8")
        sys.stderr = io.TextIOWrapper(io.FileIO(2, "w"), "utf-8", "backslashreplace")
        os.chdir(job["cwd"])
        os.environ.update(job["environment"])
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        from pliant.cli import app

        words = job["words"]
        code = app.outcome([w for w in words if w != "--debug"], debug="--debug" in words)
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        os._exit(code)


def _ended(child: int, limit: float, kill_after: float | None) -> tuple[int, bool]:
    """Wait for the process, with the signals that are due; its children do not survive it."""
    started, interrupted, killed = time.monotonic(), False, False
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        elapsed = time.monotonic() - started
        if kill_after is not None and elapsed > kill_after and not killed:
            os.kill(child, signal.SIGKILL)
            killed = True
        if elapsed > limit and not interrupted:
            os.kill(child, signal.SIGINT)
            interrupted = True
        if elapsed > limit + PATIENCE and not killed:
            os.kill(child, signal.SIGKILL)
            killed = True
        time.sleep(0.005)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(status), interrupted


if __name__ == "__main__":
    main()
