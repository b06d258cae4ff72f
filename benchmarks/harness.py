"""What every benchmark shares: fair timing, and a record of what was measured, where and when.

    figures = interleaved({"ours": run_ours, "control": run_control}, rounds=15)
    figures["ours"].ratio_to(figures["control"])     # paired, round by round

A speed is only ever told as a ratio of runs that were interleaved in one process, so that whatever
slows the machine slows both.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import random
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
import transformers

from pliant import __version__

RESULTS = Path(__file__).parent / "results"
CACHE = Path(__file__).parent / ".cache"
"""For what is dear to make and can be made again: labels, say. Not under version control."""


@dataclass(frozen=True)
class Times:
    """Seconds of the same thing done again and again, one entry a round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.seconds)

    def ratio_to(self, control: Times) -> Ratio:
        """How many times as long as the control this took."""
        pairs = zip(self.seconds, control.seconds, strict=True)
        return Ratio(tuple(ours / theirs for ours, theirs in pairs))


@dataclass(frozen=True)
class Ratio:
    """The ratio of two times, measured once a round."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.rounds)

    def as_dict(self) -> dict[str, float]:
        """The median, and the quartiles where there are enough rounds to have any."""
        found = {"median": self.median, "rounds": float(len(self.rounds))}
        if len(self.rounds) >= 4:
            low, _, high = quantiles(self.rounds, n=4)
            found |= {"lower_quartile": low, "upper_quartile": high}
        return found


def interleaved(
    runs: Mapping[str, Callable[[], Any]],
    rounds: int = 11,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Times]:
    """Time every run once a round, in an order of its own: what ran before leaves its mark.

    `clock=time.process_time` counts this process's own work: on one thread, what it would take on
    a machine that does nothing else.
    """
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(warmup):
        for name in names:
            runs[name]()
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(names, len(names)):
            seconds[name].append(_seconds(runs[name], clock))
    return {name: Times(tuple(taken)) for name, taken in seconds.items()}


def _seconds(run: Callable[[], Any], clock: Callable[[], float]) -> float:
    gc.collect()
    _settle()
    begun = clock()
    run()
    _settle()
    return clock() - begun


def _settle() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def keep(name: str, figures: Mapping[str, Any], command: str) -> Path:
    """Write `results/<name>.json`: the figures, and what is needed to measure them again."""
    RESULTS.mkdir(exist_ok=True)
    record = {
        "benchmark": name,
        "command": command,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": commit(),
        "machine": machine(),
        "figures": figures,
    }
    path = RESULTS / f"{name}.json"
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    draft.replace(path)
    print(f"written to {path.relative_to(RESULTS.parent.parent)}")
    return path


def machine() -> dict[str, Any]:
    """What it was measured on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "pliant": __version__,
    }


def _cpu() -> str:
    """The processor's own name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def commit() -> str:
    """The commit that was measured; marked when the tree held changes besides."""
    try:
        asked = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(
            asked, cwd=RESULTS.parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
