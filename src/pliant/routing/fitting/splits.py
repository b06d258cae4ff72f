"""No prompt serves two purposes: the splits of a fit, and what a router was fitted on.

The folder of a fit holds hashes of its prompts, so that the router is never measured on them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pliant.data import normalised
from pliant.errors import CorruptFile, InvalidInput
from pliant.routing.outcomes import Outcomes
from pliant.routing.scorers.imputing import imputed
from pliant.routing.scorers.linear import folds, joined
from pliant.routing.scorers.protocol import (
    Partitions,
    Predictions,
    gains,
    read_arrays,
    write_arrays,
)

FEWEST = 50
"""Labels: with fewer, nothing can be shown."""
_DIFFERENT = 10
"""Prompts, or questions, among them: two for each fold."""
_TEST, _TEST_AT_LEAST, _TEST_AT_MOST = 0.15, 60, 0.3
_FOLDS = 5
_REPEATS = ((1_000, 3), (3_000, 2))
"""Partitions by the number of rows: with few labels the noise of one partition is large."""
HASHES = "seen.safetensors"
OUT_OF_FOLD = "out-of-fold.safetensors"
Rows = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Splits:
    """The two splits of one label table: all but the test split serves every other purpose."""

    learn: Outcomes
    """Scorers are fitted on it. What is chosen on it (scorer, capacity, weights, calibration,
    threshold) is chosen by out-of-fold predictions: of scorers that had not seen the prompt."""
    partitions: Partitions
    """Of `learn`, into folds."""
    test: Outcomes
    """Used once, at the end."""
    incomplete: Outcomes | None = None
    """Prompts that not every model was asked: they train, and serve no other purpose."""

    @cached_property
    def graded(self) -> Outcomes:
        """`learn`, then the incomplete rows that some model was asked."""
        if self.incomplete is None:
            return self.learn
        both = joined((self.learn, self.incomplete))
        return both.select(~np.isnan(both.right).all(axis=1))

    @cached_property
    def train(self) -> Outcomes:
        """What scorers are fitted on: `graded` with predictions of the missing grades."""
        return imputed(self.graded)

    def train_on(self, rows: Rows) -> Outcomes:
        """Some rows of `train`, their missing grades predicted from these rows alone: for a fit
        that predicts other rows, and must not have seen their grades in predictions either."""
        key = rows.tobytes()
        if key not in self._tables:  # each kind of scorer asks for the same ones
            self._tables[key] = imputed(self.graded.select(rows))
        return self._tables[key]

    @cached_property
    def _tables(self) -> dict[bytes, Outcomes]:
        return {}

    @cached_property
    def train_partitions(self) -> Partitions:
        """Of `train`: an incomplete wording of a prompt is held out with it, or else a grade of the
        same question would be known."""
        if self.incomplete is None:
            return self.partitions
        keys = np.array(self.train.inseparable())
        more = np.arange(len(self.learn), len(keys))

        def held_out(fold: Rows) -> Rows:
            return np.concatenate([fold, more[np.isin(keys[more], keys[fold])]])

        return [[held_out(fold) for fold in folds] for folds in self.partitions]

    def sizes(self) -> dict[str, int]:
        sizes = {"learn": len(self.learn), "test": len(self.test)}
        return sizes | ({} if self.incomplete is None else {"incomplete": len(self.incomplete)})

    @property
    def how(self) -> str:
        """How the out-of-fold predictions are made, in words."""
        times = {1: "", 2: "two repeats of ", 3: "three repeats of "}[len(self.partitions)]
        return (
            "scorer, capacity, probabilities and threshold are chosen by "
            f"{times}{len(self.partitions[0])}-fold cross-validation on the labels to learn from, "
            "and the scorer is then fitted on all of them"
        )


def split(outcomes: Outcomes, seed: int = 0) -> Splits:
    """A test split, and the rest in folds; all wordings of a question stay together."""
    shared, complete = outcomes.shared(), outcomes.complete
    n = len(shared)
    if n < FEWEST:
        raise InvalidInput(
            f"{n} labels{'' if complete.all() else ' of all models'}: a fit needs {FEWEST} or "
            f"more, so label {FEWEST - n:,} more prompts (`pliant route label` on a longer file "
            "asks only the new ones)"
        )
    if (different := len(set(shared.inseparable()))) < _DIFFERENT:
        raise InvalidInput(
            f"{n} labels of {different:,} different prompts: a fit needs {_DIFFERENT} or more of "
            "them, because it predicts and tests on others than it learns from"
        )
    share = min(max(_TEST, _TEST_AT_LEAST / n), _TEST_AT_MOST)
    learn, test = shared.split((1 - share, share), seed)
    if len(set(learn.inseparable())) < _FOLDS:
        raise InvalidInput(
            f"{n} labels of {different:,} different prompts, most of which word one question: a "
            f"fit needs {_FOLDS} or more questions, because it learns from others than it predicts"
        )
    incomplete = None if complete.all() else _apart(outcomes.select(~complete), test)
    return Splits(learn, partitions(learn, seed), test, incomplete)


def _apart(incomplete: Outcomes, test: Outcomes) -> Outcomes | None:
    """Those that are no wordings of a test prompt."""
    keys = joined((incomplete, test)).inseparable()
    tested = set(keys[len(incomplete) :])
    apart = np.array([key not in tested for key in keys[: len(incomplete)]])
    return incomplete.select(apart) if apart.any() else None


def partitions(outcomes: Outcomes, seed: int = 0) -> Partitions:
    """Several divisions of the rows into folds."""
    repeats = next((k for most, k in _REPEATS if len(outcomes) <= most), 1)
    return [folds(outcomes, _FOLDS, seed + i) for i in range(repeats)]


# --- what a router was fitted on ------------------------------------------------------------------


def write_hashes(
    folder: Path,
    learned: Sequence[str],
    predictions: Predictions,
    incomplete: Sequence[str] = (),
    unseen: Predictions | None = None,
) -> None:
    """Store four bytes of each prompt's hash, which reveal nothing about its text.

    `learned` are the prompts that the scorer was fitted on, and `predictions` what it predicted of
    them out of fold: a new threshold may be chosen on them again. Of the `incomplete` prompts, that
    it was fitted on as well, there are no predictions. Those of `unseen` prompts are the reference
    for drift by another calibration.
    """
    hashes = _hashes(learned)
    _write(folder, np.concatenate([hashes, _hashes(incomplete)]), hashes[:0])
    arrays: dict[str, NDArray[Any]] = {
        "prompt": hashes,
        "gain": predictions.gain.astype(np.float32),
    }
    if predictions.right is not None:
        arrays["right"] = predictions.right.astype(np.float32)
    if predictions.novel is not None:
        arrays["novel"] = predictions.novel
    if unseen is not None and unseen.right is not None:
        arrays["unseen"] = unseen.right.astype(np.float32)
    write_arrays(folder / OUT_OF_FOLD, arrays)


def of_unseen(folder: Path) -> Predictions | None:
    """What the scorer predicted of prompts that it was not fitted on, where that is stored."""
    path = folder / OUT_OF_FOLD
    right = read_arrays(path).get("unseen") if path.is_file() else None
    return None if right is None else Predictions(right.astype(np.float64), gains(right))


def out_of_fold(folder: Path, prompts: Sequence[str]) -> tuple[Predictions, Rows]:
    """What the scorer predicted of these prompts before it had learned from them, and which of the
    prompts that is known of."""
    hashes = _hashes(prompts)
    if not (folder / OUT_OF_FOLD).is_file():  # a router of an older Pliant
        return Predictions(None, np.zeros((0, 0))), np.zeros(0, dtype=np.int64)
    arrays = read_arrays(folder / OUT_OF_FOLD)
    if not {"prompt", "gain"} <= set(arrays) or len(arrays["prompt"]) != len(arrays["gain"]):
        raise CorruptFile(f"{folder / OUT_OF_FOLD}: holds no predictions")
    row = {int(key): i for i, key in enumerate(arrays["prompt"])}
    known = np.array([i for i, key in enumerate(hashes) if int(key) in row], dtype=np.int64)
    at = np.array([row[int(hashes[i])] for i in known], dtype=np.int64)
    right, novel = arrays.get("right"), arrays.get("novel")
    predictions = Predictions(
        None if right is None else right[at].astype(np.float64),
        arrays["gain"][at].astype(np.float64),
        None if novel is None else novel[at].astype(np.bool_),
    )
    return predictions, known


def add_hashes(folder: Path, calibrated: Iterable[str], learned: Iterable[str] = ()) -> None:
    """Add prompts that a threshold was chosen on, or that the scorer learned from."""
    both = zip(_read(folder), (learned, calibrated), strict=True)
    _write(folder, *(np.concatenate([before, _hashes(prompts)]) for before, prompts in both))


def fitted_on(folder: Path, prompts: Sequence[str]) -> NDArray[np.bool_]:
    """Which of these prompts the fit in `folder` used, up to case and white space.

    With 40,000 labels one new prompt in 100,000 is mistaken for one of them.
    """
    return np.isin(_hashes(prompts), np.concatenate(_read(folder)))


def learned_from(folder: Path, prompts: Sequence[str]) -> NDArray[np.bool_]:
    """Which of these prompts the scorer was trained or chosen on."""
    return np.isin(_hashes(prompts), _read(folder)[0])


def _write(folder: Path, learned: NDArray[np.uint32], calibrated: NDArray[np.uint32]) -> None:
    arrays = {"learned": np.unique(learned), "calibrated": np.setdiff1d(calibrated, learned)}
    write_arrays(folder / HASHES, arrays)


def _read(folder: Path) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    arrays = read_arrays(folder / HASHES)
    if not {"learned", "calibrated"} <= set(arrays):
        raise CorruptFile(f"{folder / HASHES}: holds no prompts")
    return arrays["learned"], arrays["calibrated"]


def _hashes(prompts: Iterable[str]) -> NDArray[np.uint32]:
    texts = (normalised(prompt).encode("utf-8", "replace") for prompt in prompts)
    return np.array(
        [int.from_bytes(hashlib.sha256(text).digest()[:4], "big") for text in texts],
        dtype=np.uint32,
    )
