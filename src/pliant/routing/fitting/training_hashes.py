"""Hashes of the prompts that a router was fitted on, so that it is never measured on them."""

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
    """Store four bytes of each prompt's hash, which reveal nothing about its text.

    `learned` are the prompts that the scorer was trained or chosen on. `calibrated` are those that
    only its probabilities and threshold come from: a new threshold may use them again.
    """
    _write(folder, _hashes(learned), _hashes(calibrated))


def add(folder: Path, calibrated: Iterable[str]) -> None:
    """Add prompts that a threshold was chosen on."""
    learned, before = _read(folder)
    _write(folder, learned, np.concatenate([before, _hashes(calibrated)]))


def among(folder: Path, prompts: Sequence[str]) -> NDArray[np.bool_]:
    """Which of these prompts the router in `folder` was fitted on, up to case and white space.

    With 40,000 labels one new prompt in 100,000 is mistaken for one of them.
    """
    return np.isin(_hashes(prompts), np.concatenate(_read(folder)))


def learned(folder: Path, prompts: Sequence[str]) -> NDArray[np.bool_]:
    """Which of these prompts the scorer was trained or chosen on."""
    return np.isin(_hashes(prompts), _read(folder)[0])


def _write(folder: Path, learned: NDArray[np.uint32], calibrated: NDArray[np.uint32]) -> None:
    arrays = {"learned": np.unique(learned), "calibrated": np.setdiff1d(calibrated, learned)}
    write_arrays(folder / FILE, arrays)


def _read(folder: Path) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
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
