"""Decides by cost where the prompts' keys and values are stored between epochs, and stores them.

Three places: in memory, in files that are mapped, or nowhere, so that each epoch computes them
again (still without gradient, and without the head). The bytes are known before anything is stored.
If they do not fit into memory, a few prompts are run, written and read to find the cheapest place.
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

from pliant.complexity.prefix_cache import disk
from pliant.complexity.prefix_cache.store import (
    Layout,
    PrefixStore,
    RunPrompts,
    by_length,
    in_memory,
    rows_of,
)
from pliant.complexity.scorer import PromptScorer
from pliant.errors import InvalidInput, UnsupportedModel
from pliant.prefill import Batch

SHARE = 0.5  # of the free memory: training and other programs need the rest
SAMPLE = 4  # prompts that are run to measure the cost


@dataclass(frozen=True)
class Storage:
    """Where prefixes are stored, and why."""

    where: str
    """memory, disk or recompute."""
    why: str
    bytes: int = 0
    """Of all prompts, estimated before any was stored."""


def choose_storage(
    ids: Sequence[Tensor],
    uses: int,
    run: RunPrompts,
    *,
    wanted: str = "auto",
    inexact: str = "",
    folder: Path,
    processes: int = 1,
    alike: bool = False,
) -> Storage:
    """Where to store these prompts, each of which is used `uses` times.

    `inexact` is the reason why keys and values change between epochs, if they do. With `alike`, all
    processes must run the model equally often, so none of them measures anything.
    """
    if inexact:
        return Storage("recompute", inexact)
    if wanted == "recompute":
        return Storage("recompute", "requested")
    if uses <= 1 and wanted == "auto":
        return Storage("recompute", "each prompt is used once")
    trial = by_length(ids)[len(ids) // 2 :][:SAMPLE]
    batch = Batch.of([ids[i] for i in trial])
    try:
        with torch.no_grad():
            layout, chunk = rows_of(run(batch.ids_BT, batch.mask_BT))
    except UnsupportedModel as error:
        if wanted != "auto":
            raise
        return Storage("recompute", str(error))
    size = layout.bytes(torch.tensor([len(row) for row in ids]), chunk.rows[0].element_size())
    if wanted != "auto":
        return Storage(wanted, "requested", size)
    if size * processes <= SHARE * free_memory():
        return Storage("memory", f"{_bytes(size)} fit into memory", size)
    if alike:
        return Storage(
            "disk", f"{_bytes(size)} do not fit into memory (sharded: not measured)", size
        )
    return _cheapest(size, uses, run, batch, layout, folder)


def store(
    storage: Storage,
    scorer: PromptScorer,
    ids: Sequence[Tensor],
    run: RunPrompts,
    *,
    folder: Path,
    share: tuple[int, int] = (0, 1),
    barrier: Callable[[], None] = lambda: None,
) -> PrefixStore | None:
    """Store the prompts where `storage` says; process i of n stores its part: `share=(i, n)`."""
    if storage.where == "recompute":
        return None
    rows = scorer.config.rows
    if storage.where == "memory":
        return in_memory(run, ids).with_capacity(rows)
    place = disk.folder_of(folder, scorer, ids)
    disk.write_files(place, run, ids, share)
    barrier()
    return disk.open_files(place, ids).with_capacity(rows)


def free_memory() -> int:
    """Bytes available without swapping, if the system reports them; else 4 GiB."""
    limits = []
    info = Path("/proc/meminfo")
    if info.is_file():
        lines = dict(line.split(":", 1) for line in info.read_text().splitlines())
        limits.append(int(lines["MemAvailable"].split()[0]) * 1024)
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (most := limit.read_text().strip()).isdigit():
        used = Path("/sys/fs/cgroup/memory.current")
        limits.append(int(most) - (int(used.read_text()) if used.is_file() else 0))
    return min(limits, default=2**32)


def _cheapest(
    size: int, uses: int, run: RunPrompts, batch: Batch, layout: Layout, folder: Path
) -> Storage:
    """Compare recomputing with a disk, by the seconds that a few prompts take."""
    full = f"{_bytes(size)} do not fit into memory"
    if size > 0.9 * _free_disk(folder):
        return Storage("recompute", f"{full}, nor onto the disk", size)
    began = time.perf_counter()
    with torch.no_grad():
        _, chunk = rows_of(run(batch.ids_BT, batch.mask_BT))
    computing = time.perf_counter() - began
    writing, reading = _disk_seconds(layout, chunk, folder)
    times = size / max(1, chunk.bytes)
    again = computing * times * uses
    reread = (computing + writing + reading * uses) * times
    compared = f"{full}; {uses} uses cost {reread:.0f} s from disk and {again:.0f} s recomputed"
    return Storage("disk" if reread < again else "recompute", compared, size)


def _disk_seconds(layout: Layout, chunk: Any, folder: Path) -> tuple[float, float]:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        began = time.perf_counter()
        path = disk.write(Path(place), 0, layout, chunk)
        written = time.perf_counter()
        disk.drop_from_page_cache(path)
        for rows in disk.mapped(path)[1].rows:
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


def check_fits(prefixes: PrefixStore, run: RunPrompts, ids: Sequence[Tensor]) -> None:
    """Refuse prefixes of other prompts, another base or depth: runs the prompt of middle length
    again and compares."""
    if len(prefixes) != len(ids):
        raise InvalidInput(f"{len(prefixes)} prefixes are stored for {len(ids)} prompts")
    middle = by_length(ids)[len(ids) // 2]
    batch = Batch.of([ids[middle]])
    layout, chunk = rows_of(run(batch.ids_BT, batch.mask_BT))
    batch_of_one = prefixes.batch([middle])
    same = layout.kinds == prefixes.layout.kinds and batch_of_one.lengths == (len(ids[middle]),)
    if not same or not all(map(_is_close, batch_of_one.tensors, chunk.rows)):
        raise InvalidInput(
            f"the stored prefix of prompt {middle} differs from what the base computes now: store "
            "these prompts again, with remember(scorer, prompts)"
        )


def _is_close(stored_1HTK: Tensor, rows: Tensor) -> bool:
    """Up to rounding, in half precision as well."""
    stored = stored_1HTK[0].transpose(0, 1).flatten(1).float()
    return stored.shape == rows.shape and bool((stored - rows).norm() <= 0.03 * rows.float().norm())
