"""Stored prefixes in a folder: one safetensors file for some prompts, mapped into memory.

    prefixes/3f9c.../00012.safetensors

The folder's name is a fingerprint of the base, of what is attached to it, of its dtype and depth,
and of all prompts' ids, so prefixes of anything else are never used. A file is renamed into place
when it is complete, so an interrupted run resumes where it stopped, and several processes may fill
one folder together.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
import xxhash
from torch import Tensor

from pliant.adapters.active_peft import active_layers
from pliant.adapters.saving import gathered
from pliant.complexity.prefix_cache.store import (
    Chunk,
    Layout,
    PrefixStore,
    RunPrompts,
    batches,
    by_length,
    computed,
    concatenated,
)
from pliant.complexity.scorer import PromptScorer
from pliant.errors import AdapterError
from pliant.files import unfinished_name

FORMAT = 4
TOKENS = 65_536  # in a file, padded


def write_files(
    folder: Path, run: RunPrompts, ids: Sequence[Tensor], share: tuple[int, int] = (0, 1)
) -> None:
    """Write the files that are missing; of n processes the i-th writes every n-th (`share`)."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for number, part in enumerate(parts(ids)):
            if number % share[1] == share[0] and _written(folder, number, part, ids) is None:
                write(folder, number, *concatenated(computed(run, ids, part)))
    except OSError as error:
        raise AdapterError(f"{folder}: cannot be written ({error.strerror or error})") from error


def open_files(folder: Path, ids: Sequence[Tensor]) -> PrefixStore:
    """The prefixes of all prompts, mapped: their bytes are read with the batch that needs them."""
    order, chunks, layout = by_length(ids), [], None
    for number, part in enumerate(parts(ids)):
        written = _written(folder, number, part, ids)
        if written is None:
            raise AdapterError(
                f"{folder}: {_name(number)} is missing or incomplete: store it again"
            )
        layout, chunk = written
        chunks.append(chunk)
    assert layout is not None
    return PrefixStore(layout, tuple(chunks), torch.tensor(order).argsort(), "disk")


def parts(ids: Sequence[Tensor]) -> Iterator[list[int]]:
    """The prompts of each file, the shortest first."""
    return batches(ids, by_length(ids), TOKENS)


def folder_of(root: Path, scorer: PromptScorer, ids: Sequence[Tensor]) -> Path:
    """The folder for the prefixes of these prompts and this base as it is now.

    Its name changes with whatever they depend on: every value of every parameter and buffer but a
    scorer's, the active PEFT adapters, dtypes, the depth, the attention implementation, the ids and
    their order. (Weights that accelerate offloads are on the meta device: only their shapes count.)
    """
    digest = hashlib.sha256()
    config = getattr(scorer.base, "config", None)
    attention = getattr(config, "_attn_implementation", "")
    digest.update(json.dumps([FORMAT, scorer.config.layer, attention]).encode())
    for name, layers in active_layers(scorer.base).items():  # all weights count, but not all act
        digest.update(json.dumps([name, [(e.path, e.scaling) for e in layers]]).encode())
    own = {id(buffer) for buffer in scorer.buffers()}
    buffers = [(name, b) for name, b in scorer.base.named_buffers() if id(b) not in own]
    for name, tensor in [*scorer.base_parameters(), *buffers]:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(checksum(tensor))
    for row in ids:
        digest.update(row.to(torch.int64).cpu().numpy().tobytes() + b"|")
    return root / digest.hexdigest()[:24]


BLOCK = 2**20
"""Bytes hashed at once: a buffer that fits a core's cache gives 10 GB/s instead of 2."""


def checksum(tensor: Tensor) -> bytes:
    """Of every bit, whatever the strides; sharded tensors are gathered. xxh3 detects edits, not
    forgeries."""
    if tensor.is_meta or not tensor.numel():
        return b""
    octets = gathered(tensor.detach()).contiguous().reshape(-1).view(torch.uint8)
    # Through a buffer: numpy would pin the tensor's own storage, which FSDP resizes.
    buffer = torch.empty(min(BLOCK, len(octets)), dtype=torch.uint8)
    view: Any = buffer.numpy()
    digest = xxhash.xxh3_128()
    for block in octets.split(BLOCK):
        buffer[: len(block)].copy_(block)
        digest.update(view[: len(block)])
    return digest.digest()


# --- one file ------------------------------------------------------------------------------------


def _name(number: int) -> str:
    return f"{number:05}.safetensors"


def write(folder: Path, number: int, layout: Layout, chunk: Chunk) -> Path:
    """Under a temporary name first: another process may be writing the same file."""
    tensors = {f"{slot:04}": rows for slot, rows in enumerate(chunk.rows)}
    tensors["lengths"] = chunk.lengths
    metadata = {"layout": json.dumps([layout.kinds, layout.shapes])}
    unfinished = unfinished_name(folder / _name(number))
    try:
        safetensors.torch.save_file(tensors, unfinished, metadata)
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(folder / _name(number))
    except safetensors.SafetensorError as error:
        raise AdapterError(f"{folder}: cannot be written ({error})") from error
    finally:
        unfinished.unlink(missing_ok=True)
    return folder / _name(number)


def mapped(path: Path) -> tuple[Layout, Chunk]:
    """A file's content; its bytes are read on use."""
    with safetensors.safe_open(str(path), "pt") as file:
        kinds, shapes = json.loads(file.metadata()["layout"])
    tensors = safetensors.torch.load_file(path)
    lengths = tensors.pop("lengths")
    layout = Layout(tuple(kinds), tuple((heads, size) for heads, size in shapes))
    rows = tuple(tensors[f"{slot:04}"] for slot in range(len(tensors)))
    return layout, Chunk(lengths, rows)


def drop_from_page_cache(path: Path) -> None:
    """So that the next read of the file is from the disk."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _written(
    folder: Path, number: int, part: Sequence[int], ids: Sequence[Tensor]
) -> tuple[Layout, Chunk] | None:
    """A file's content, mapped; None if it is missing, broken or of other lengths."""
    path = folder / _name(number)
    if not path.is_file():
        return None
    try:
        layout, chunk = mapped(path)
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError):
        return None
    complete = chunk.lengths.tolist() == [len(ids[i]) for i in part]
    return (layout, chunk) if complete else None
