"""Which prompts a router was made on: kept as hashes, so that it is never measured on them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pliant.data import normalised
from pliant.errors import CorruptFile
from pliant.routing.scorers.protocol import read_arrays, write_arrays

FILE = "seen.safetensors"


def write(folder: Path, prompts: Iterable[str]) -> None:
    """Keep four bytes of each prompt's hash; they say nothing about what a prompt said."""
    write_arrays(folder / FILE, {"prompts": np.unique(_hashes(prompts))})


def add(folder: Path, prompts: Iterable[str]) -> None:
    """Keep some more."""
    both = np.concatenate([_known(folder), _hashes(prompts)])
    write_arrays(folder / FILE, {"prompts": np.unique(both)})


def among(folder: Path, prompts: Sequence[str]) -> NDArray[np.bool_]:
    """Which of these prompts the router in `folder` was made on, but for case and white space.

    Of prompts that it was not, one in 100,000 is taken for one that it was, at 40,000 labels.
    """
    return np.isin(_hashes(prompts), _known(folder))


def _known(folder: Path) -> NDArray[np.uint32]:
    known = read_arrays(folder / FILE).get("prompts")
    if known is None:
        raise CorruptFile(f"{folder / FILE}: holds no prompts")
    return known


def _hashes(prompts: Iterable[str]) -> NDArray[np.uint32]:
    texts = (normalised(prompt).encode("utf-8", "replace") for prompt in prompts)
    return np.array(
        [int.from_bytes(hashlib.sha256(text).digest()[:4], "big") for text in texts],
        dtype=np.uint32,
    )
