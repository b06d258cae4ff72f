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


def write(folder: Path, learned: Iterable[str], calibrated: Iterable[str]) -> None:
    """Keep four bytes of each prompt's hash; they say nothing about what a prompt said.

    Those that the scorer was trained or chosen on, and those that only its probabilities and its
    threshold were made on: a new threshold may be made on the latter.
    """
    _write(folder, _hashes(learned), _hashes(calibrated))


def add(folder: Path, calibrated: Iterable[str]) -> None:
    """Keep some more that a threshold was made on."""
    learned, before = _known(folder)
    _write(folder, learned, np.concatenate([before, _hashes(calibrated)]))


def among(folder: Path, prompts: Sequence[str]) -> NDArray[np.bool_]:
    """Which of these prompts the router in `folder` was made on, but for case and white space.

    Of prompts that it was not, one in 100,000 is taken for one that it was, at 40,000 labels.
    """
    return np.isin(_hashes(prompts), np.concatenate(_known(folder)))


def learned(folder: Path, prompts: Sequence[str]) -> NDArray[np.bool_]:
    """Which of these prompts the scorer was trained or chosen on."""
    return np.isin(_hashes(prompts), _known(folder)[0])


def _write(folder: Path, learned: NDArray[np.uint32], calibrated: NDArray[np.uint32]) -> None:
    arrays = {"learned": np.unique(learned), "calibrated": np.setdiff1d(calibrated, learned)}
    write_arrays(folder / FILE, arrays)


def _known(folder: Path) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    arrays = read_arrays(folder / FILE)
    if not {"learned", "calibrated"} <= set(arrays):
        raise CorruptFile(f"{folder / FILE}: holds no prompts")
    return arrays["learned"], arrays["calibrated"]


def _hashes(prompts: Iterable[str]) -> NDArray[np.uint32]:
    texts = (normalised(prompt).encode("utf-8", "replace") for prompt in prompts)
    return np.array(
        [int.from_bytes(hashlib.sha256(text).digest()[:4], "big") for text in texts],
        dtype=np.uint32,
    )
