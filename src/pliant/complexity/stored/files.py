"""Stored prefixes in a folder: one safetensors file for some prompts, mapped into memory when read.

    prefixes/3f9c.../00012.safetensors

The folder's name is a fingerprint of the base, of what is attached to it, of its dtype and depth,
and of all prompts' ids: prefixes of anything else lie elsewhere and are never used. A file is
written under another name and renamed when it is whole, so a store that was interrupted goes on
where it stopped, and several processes may fill one folder together.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from pliant.complexity.stored.checksum import checksum
from pliant.complexity.stored.prefixes import (
    Chunk,
    Layout,
    Run,
    Stored,
    by_length,
    computed,
    placed,
)
from pliant.errors import AdapterError

if TYPE_CHECKING:
    from pliant.complexity.model import Complexity

FORMAT = 2
TOKENS = 65_536  # of a file, about


def on_disk(
    folder: Path,
    run: Run,
    ids: Sequence[Tensor],
    *,
    device: Any = None,
    mine: tuple[int, int] = (0, 1),
) -> None:
    """Write the files that are missing; of n processes the i-th writes every n-th (`mine`)."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for number, part in enumerate(parts(ids)):
            if number % mine[1] == mine[0] and _written(folder, number, part, ids) is None:
                write(folder, number, *_whole(computed(run, ids, part, device)))
    except OSError as error:
        raise AdapterError(f"{folder}: cannot be written ({error.strerror or error})") from error


def opened(folder: Path, ids: Sequence[Tensor]) -> Stored:
    """The prefixes of all prompts, mapped: their bytes are read when they are picked."""
    order, chunks, layout = by_length(ids), [], None
    for number, part in enumerate(parts(ids)):
        written = _written(folder, number, part, ids)
        if written is None:
            raise AdapterError(f"{folder}: {_name(number)} is missing or not whole: store it again")
        layout, chunk = written
        chunks.append(chunk)
    assert layout is not None
    return Stored(layout, tuple(chunks), placed(order), "disk")


def parts(ids: Sequence[Tensor]) -> list[list[int]]:
    """The prompts of each file: the shortest first, each file of about as many tokens."""
    made: list[list[int]] = []
    tokens = TOKENS
    for i in by_length(ids):
        if tokens + len(ids[i]) > TOKENS and tokens:
            made.append([])
            tokens = 0
        made[-1].append(i)
        tokens += len(ids[i])
    return made


def folder_of(root: Path, scorer: Complexity, ids: Sequence[Tensor]) -> Path:
    """Where the prefixes of these prompts lie, for this base as it is now."""
    return root / fingerprint(scorer, ids)[:24]


def fingerprint(scorer: Complexity, ids: Sequence[Tensor]) -> str:
    """Changes with whatever the prefixes depend on: every value of every parameter and buffer but
    a scorer's, dtypes, the depth, the way of attending, the ids and their order. (Weights that
    accelerate keeps elsewhere are on the meta device, and known by their shapes alone.)"""
    digest = hashlib.sha256()
    config = getattr(scorer.base, "config", None)
    how = getattr(config, "_attn_implementation", "")
    digest.update(json.dumps([FORMAT, scorer.config.layer, how]).encode())
    own = {id(buffer) for buffer in scorer.buffers()}
    buffers = [(name, b) for name, b in scorer.base.named_buffers() if id(b) not in own]
    for name, tensor in [*scorer.base_parameters(), *buffers]:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(checksum(tensor))
    for row in ids:
        digest.update(row.to(torch.int64).cpu().numpy().tobytes() + b"|")
    return digest.hexdigest()


# --- one file ------------------------------------------------------------------------------------


def _name(number: int) -> str:
    return f"{number:05}.safetensors"


def _whole(found: Iterable[tuple[Layout, Chunk]]) -> tuple[Layout, Chunk]:
    layouts, chunks = zip(*found, strict=True)
    rows = zip(*(chunk.rows for chunk in chunks), strict=True)
    lengths = torch.cat([chunk.lengths for chunk in chunks])
    return layouts[0], Chunk(lengths, tuple(torch.cat(stack) for stack in rows))


def write(folder: Path, number: int, layout: Layout, chunk: Chunk) -> Path:
    """Under a name of this process's own first: another may be writing the same."""
    tensors = {f"{slot:04}": rows for slot, rows in enumerate(chunk.rows)}
    tensors["lengths"] = chunk.lengths
    said = {"layout": json.dumps([layout.kinds, layout.shapes])}
    unfinished = folder / f".{_name(number)}.{os.getpid()}"
    try:
        safetensors.torch.save_file(tensors, unfinished, said)
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(folder / _name(number))
    except safetensors.SafetensorError as error:
        raise AdapterError(f"{folder}: cannot be written ({error})") from error
    finally:
        unfinished.unlink(missing_ok=True)
    return folder / _name(number)


def mapped(path: Path) -> tuple[Layout, Chunk]:
    """A file's content; its bytes are read when they are used."""
    with safetensors.safe_open(str(path), "pt") as file:
        kinds, shapes = json.loads(file.metadata()["layout"])
    tensors = safetensors.torch.load_file(path)
    lengths = tensors.pop("lengths")
    layout = Layout(tuple(kinds), tuple((heads, size) for heads, size in shapes))
    rows = tuple(tensors[f"{slot:04}"] for slot in range(len(tensors)))
    return layout, Chunk(lengths, rows)


def forget(path: Path) -> None:
    """Have the system drop what it remembers of a file, so that reading it reads the disk."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _written(
    folder: Path, number: int, part: Sequence[int], ids: Sequence[Tensor]
) -> tuple[Layout, Chunk] | None:
    """A file's content, mapped; None where there is none, or not of these lengths."""
    path = folder / _name(number)
    if not path.is_file():
        return None
    try:
        layout, chunk = mapped(path)
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError):
        return None
    whole = chunk.lengths.tolist() == [len(ids[i]) for i in part]
    return (layout, chunk) if whole else None
