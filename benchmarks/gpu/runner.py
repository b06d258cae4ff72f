"""Runs the rows within the time that there is, and writes `gpu.json` after each.

A row runs in a process of its own, so that one that hangs, crashes or runs out of memory costs only
itself; what it had measured until then stays. A row that is there with the same settings is not run
again; one that failed or was skipped is.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import zip_longest
from pathlib import Path
from typing import Any

from benchmarks.gpu.process import Process, run_row, write
from benchmarks.gpu.rows import Row

Outcome = dict[str, Any]


@dataclass
class Run:
    """All rows in order; what is left out, and why, is in the results too."""

    folder: Path
    rows: Sequence[Row]
    device: str
    minutes: float = 8.0
    isolated: bool = True
    command: Callable[[Row, Path], list[str]] | None = None
    """Starts a row's process; by default this package's command line."""
    record: dict[str, Any] = field(default_factory=dict)

    def go(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.record = self._before() | {
            "benchmark": "gpu",
            "command": "python -m benchmarks.gpu " + " ".join(sys.argv[1:]),
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        }
        self.record.setdefault("rows", {})
        due = [row for row in self.rows if not self._is_there(row)]
        print(f"{len(due)} of {len(self.rows)} rows to run on {self.device}", flush=True)
        self._end = time.monotonic() + 60 * self.minutes
        self._waiting: dict[str, Process] = {}
        try:
            for row, following in zip_longest(due, due[1:]):
                self._add(row, self._outcome(row, following))
        finally:
            for process in self._waiting.values():
                process.stop()

    @property
    def path(self) -> Path:
        return self.folder / "gpu.json"

    @property
    def failures(self) -> list[str]:
        results = self.record.get("rows", {})
        return [name for name, result in results.items() if result["status"] == "failed"]

    def _outcome(self, row: Row, following: Row | None) -> Outcome:
        left = self._end - time.monotonic()
        if left < row.expected:
            reason = f"{max(0, left):.0f} s were left, and it takes about {row.expected:.0f} s"
            return {"status": "skipped", "reason": reason}
        if not self.isolated:
            return run_row(row, self.device, self._draft(row))
        process = self._waiting.pop(row.name, None) or self._started(row)
        if following is not None:  # it imports its libraries meanwhile
            self._waiting[following.name] = self._started(following)
        return process.outcome(row.limit, left)

    def _started(self, row: Row) -> Process:
        draft = self._draft(row)
        command = self.command or self._command
        return Process(command(row, draft), draft)

    def _command(self, row: Row, to: Path) -> list[str]:
        """The command line again, for this row alone."""
        command = [sys.executable, "-m", "benchmarks.gpu", "--device", self.device]
        command += ["--out", str(self.folder.absolute()), "--row", row.name, "--to", str(to)]
        if "--dry-run" in sys.argv:
            command.append("--dry-run")
        if folder := row.settings.get("folder"):
            command += ["--model", folder]
        return command

    def _draft(self, row: Row) -> Path:
        return self.folder.absolute() / f".gpu-row-{self.rows.index(row)}.json"

    # --- the results ---

    def _add(self, row: Row, outcome: Outcome) -> None:
        self._draft(row).unlink(missing_ok=True)
        for name in ("machine", "commit"):
            self.record[name] = outcome.pop(name, self.record.get(name))
        result = {"settings": row.settings, "device": self.device} | outcome
        self.record["rows"][row.name] = result
        write(self.path, self.record)
        print(f"{row.name}: {line_of(result)}", flush=True)

    def _before(self) -> dict[str, Any]:
        try:
            record = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return record if isinstance(record, dict) else {}

    def _is_there(self, row: Row) -> bool:
        result = self.record["rows"].get(row.name, {})
        same = result.get("settings") == row.settings and result.get("device") == self.device
        return bool(same and result.get("status") == "done")


def line_of(result: dict[str, Any]) -> str:
    """A result for the terminal: its ratios, or what was wrong."""
    took = f" in {result['seconds']:.0f} s" if "seconds" in result else ""
    reason = f" ({result['reason']})" if "reason" in result else ""
    ratios = [
        f"{name}: {value['median']:.2f} {key}"
        for name, figures in result.get("figures", {}).items()
        for key, value in figures.items()
        if key.startswith("times as fast") and isinstance(value, dict)
    ]
    return f"{result['status']}{took}{reason}" + "".join(f"\n    {ratio}" for ratio in ratios)
