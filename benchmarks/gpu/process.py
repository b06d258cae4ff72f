"""One row, run here or in a process of its own, whose figures are written as they come."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from benchmarks.gpu import ROOT
from benchmarks.gpu.rows import Row

STARTUP = 30.0
"""Seconds that a process may take to import its libraries, besides its row's limit."""
LINES = 12
"""How many of a traceback's last lines are written."""


class Process:
    """A row's process. It imports its libraries, waits until it is told to begin, and then runs."""

    def __init__(self, command: list[str], draft: Path) -> None:
        self.draft = draft
        draft.unlink(missing_ok=True)
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            start_new_session=True,
        )

    def outcome(self, limit: float, left: float) -> dict[str, Any]:
        """Tell it to begin, and wait for its outcome; or for what it had until then."""
        began, most = time.monotonic(), min(limit + STARTUP, left)
        try:
            self._process.communicate(b"\n", timeout=most)
        except subprocess.TimeoutExpired:
            return self._stopped(f"stopped after {most:.0f} s") | {"seconds": round(most, 1)}
        finally:
            self.stop()
        outcome = self._written()
        if outcome.get("status") in ("done", "failed"):
            return outcome
        code = self._process.returncode
        outcome = self._stopped(f"its process ended with {code}")
        return outcome | {"seconds": round(time.monotonic() - began, 1)}

    def stop(self) -> None:
        """With all that it has started."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()

    def _stopped(self, reason: str) -> dict[str, Any]:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return self._written() | {"status": "failed", "reason": reason, "errors": lines[-LINES:]}

    def _written(self) -> dict[str, Any]:
        try:
            return dict(json.loads(self.draft.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return {}


def run_waiting(row: Row, device: str, to: Path) -> int:
    """In the process of a row: import, wait for the word to begin, run."""
    row.load()
    if not sys.stdin.readline():
        return 1  # the run has ended
    run_row(row, device, to)
    return 0


def run_row(row: Row, device: str, to: Path) -> dict[str, Any]:
    """Run a row here; its outcome is returned, and written to `to` after each figure."""
    from benchmarks.harness import commit, machine

    row.load()
    began = time.monotonic()
    outcome: dict[str, Any] = {"status": "running", "figures": {}}
    outcome |= {"machine": machine(), "commit": commit()}
    gc.collect()
    gc.freeze()  # benchmarks collect garbage before each run: libraries need not be looked at

    def keep(name: str, figures: dict[str, Any]) -> None:
        outcome["figures"][name] = figures
        write(to, outcome)

    try:
        row.run(device, keep)
        figures = outcome["figures"].items()
        wrong = [name for name, f in figures if f.get("passed") is False or "error" in f]
        outcome["status"] = "failed" if wrong else "done"
        if wrong:
            outcome["reason"] = "wrong, or not run: " + "; ".join(wrong)
    except Exception as error:  # the other rows run nevertheless
        outcome["status"] = "failed"
        outcome["reason"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        outcome["errors"] = traceback.format_exc().strip().splitlines()[-LINES:]
    finally:
        gc.unfreeze()
    outcome |= card(device) | {"seconds": round(time.monotonic() - began, 1)}
    write(to, outcome)
    return outcome


def card(device: str) -> dict[str, Any]:
    """The card, and the most of its memory that the row held."""
    import torch

    if device != "cuda":
        return {"card": None, "peak bytes": None}
    name, peak = torch.cuda.get_device_name(), torch.cuda.max_memory_allocated()
    return {"card": name, "peak bytes": peak}


def write(path: Path, content: dict[str, Any]) -> None:
    """Under a temporary name first: a run that is killed leaves the file of before."""
    draft = path.with_suffix(path.suffix + ".new")
    draft.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    draft.replace(path)
