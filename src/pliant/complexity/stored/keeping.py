"""Where the prompts' keys and values are kept between epochs: decided by what it costs, and said.

Three ways: in memory, in files that are mapped, or nowhere, so that each epoch computes them again
(still without gradient, and without the head). The bytes are known before anything is stored. Where
memory cannot hold them, a few prompts are run, written and read, and the cheapest way is taken.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pliant.complexity.stored import files as prefix_files
from pliant.complexity.stored.prefixes import Layout, Run, Stored, by_length, in_memory, rows_of
from pliant.complexity.training.train_module import TrainModule
from pliant.errors import InvalidInput, UnsupportedModel
from pliant.prefill import Batch

SHARE = 0.5  # of the memory that is free: the training needs some, and so may others
SAMPLE = 4  # prompts that are run to measure


@dataclass(frozen=True)
class Kept:
    """The way that was taken."""

    where: str
    """memory, disk or recompute."""
    why: str
    bytes: int = 0
    """Of all prompts, estimated before any was stored."""


def decide(
    module: TrainModule,
    ids: Sequence[Tensor],
    uses: int,
    run: Run,
    *,
    wanted: str = "auto",
    folder: Path,
    device: Any = None,
    processes: int = 1,
    alike: bool = False,
) -> Kept:
    """How to keep these prompts, each of which will be used so many times.

    `alike`: all processes must run the model equally often, whatever each finds on its machine.
    """
    if reason := why_not_exact(module):
        return Kept("recompute", reason)
    if wanted == "recompute":
        return Kept("recompute", "asked for")
    if uses <= 1 and wanted == "auto":
        return Kept("recompute", "each prompt is used once")
    trial = by_length(ids)[len(ids) // 2 :][:SAMPLE]
    batch = Batch.of([ids[i] for i in trial], device=device)
    try:
        with torch.no_grad():
            layout, chunk = rows_of(run(batch.ids_BT, batch.mask_BT))
    except UnsupportedModel as error:
        if wanted != "auto":
            raise
        return Kept("recompute", str(error))
    size = layout.bytes(torch.tensor([len(row) for row in ids]), chunk.rows[0].element_size())
    if wanted != "auto":
        return Kept(wanted, "asked for", size)
    if size * processes <= SHARE * free_memory():
        return Kept("memory", f"{_bytes(size)} fit into memory", size)
    if alike:
        return Kept("disk", f"{_bytes(size)} do not fit into memory (sharded: not measured)", size)
    return _cheapest(size, uses, run, batch, layout, folder)


def why_not_exact(module: TrainModule) -> str:
    """Why a prompt's keys and values would not be the same in the next epoch; empty if they are."""
    if trained := next(module.trained_base(), None):
        return f"the base is trained ({trained[0]}), so its keys and values change at each step"
    if module.base_dropout and module.has_dropout:
        return "the base's dropout is on, so its keys and values differ at each step"
    return ""


def stored(
    kept: Kept,
    module: TrainModule,
    ids: Sequence[Tensor],
    run: Run,
    *,
    folder: Path,
    device: Any = None,
    mine: tuple[int, int] = (0, 1),
    meet: Callable[[], None] = lambda: None,
) -> Stored | None:
    """The prompts, kept as was decided; of n processes the i-th stores its share: `mine=(i, n)`."""
    if kept.where == "recompute":
        return None
    rows = module.scorer.config.rows
    if kept.where == "memory":
        return in_memory(run, ids, device).with_room(rows)
    place = prefix_files.folder_of(folder, module.scorer, ids)
    prefix_files.on_disk(place, run, ids, device=device, mine=mine)
    meet()
    return prefix_files.opened(place, ids).with_room(rows)


def free_memory() -> int:
    """Bytes that could be taken without swapping, as far as the system tells."""
    found = []
    info = Path("/proc/meminfo")
    if info.is_file():
        lines = dict(line.split(":", 1) for line in info.read_text().splitlines())
        found.append(int(lines["MemAvailable"].split()[0]) * 1024)
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (most := limit.read_text().strip()).isdigit():
        used = Path("/sys/fs/cgroup/memory.current")
        found.append(int(most) - (int(used.read_text()) if used.is_file() else 0))
    return min(found, default=2**32)


def _cheapest(size: int, uses: int, run: Run, batch: Batch, layout: Layout, folder: Path) -> Kept:
    """Seconds of both ways, from a few prompts that are run, written and read."""
    full = f"{_bytes(size)} do not fit into memory"
    if size > 0.9 * _free_disk(folder):
        return Kept("recompute", f"{full}, nor onto the disk", size)
    began = time.perf_counter()
    with torch.no_grad():
        _, chunk = rows_of(run(batch.ids_BT, batch.mask_BT))
    computing = time.perf_counter() - began
    writing, reading = _disk_seconds(layout, chunk, folder)
    times = size / max(1, chunk.bytes)
    again = computing * times * uses
    disk = (computing + writing + reading * uses) * times
    compared = f"{full}; {uses} uses cost {disk:.0f} s from disk and {again:.0f} s computed anew"
    return Kept("disk" if disk < again else "recompute", compared, size)


def _disk_seconds(layout: Layout, chunk: Any, folder: Path) -> tuple[float, float]:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        began = time.perf_counter()
        path = prefix_files.write(Path(place), 0, layout, chunk)
        written = time.perf_counter()
        prefix_files.forget(path)
        for rows in prefix_files.mapped(path)[1].rows:
            rows.clone()
        return written - began, time.perf_counter() - written


def _free_disk(folder: Path) -> int:
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    return shutil.disk_usage(there).free


def _bytes(size: float) -> str:
    for unit in ("bytes", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def check_fits(found: Stored, module: TrainModule, ids: Sequence[Tensor]) -> None:
    """Whether what was stored is of these prompts, this base and this depth: one of middle length
    is run again, and compared."""
    if len(found) != len(ids):
        raise InvalidInput(f"{len(found)} prefixes are stored, and there are {len(ids)} prompts")
    middle = by_length(ids)[len(ids) // 2]
    batch = Batch.of([ids[middle]], device=module.scorer.rows.device)
    layout, chunk = rows_of(module.prefilled(batch.ids_BT, batch.mask_BT))
    picked = found.pick([middle])
    same = layout.kinds == found.layout.kinds and picked.lengths == (len(ids[middle]),)
    if not same or not all(map(_alike, picked.tensors, chunk.rows)):
        raise InvalidInput(
            f"the stored prefix of prompt {middle} is not what the base makes of it now: store "
            "these prompts again, with remember(scorer, prompts)"
        )


def _alike(kept_1HTK: Tensor, rows: Tensor) -> bool:
    """To what rounding makes, in half precision as well."""
    kept = kept_1HTK[0].transpose(0, 1).flatten(1).float()
    return kept.shape == rows.shape and bool((kept - rows).norm() <= 0.03 * rows.float().norm())
