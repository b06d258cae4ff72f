"""No prompt serves two purposes: the splits of a fit, and what a router was fitted on.

The folder of a fit holds hashes of its prompts, so that the router is never measured on them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pliant.data import normalised
from pliant.errors import CorruptFile, InvalidInput
from pliant.routing.outcomes import Outcomes
from pliant.routing.scorers.protocol import read_arrays, write_arrays

FEWEST = 200
"""Labels: five splits of fewer show nothing."""
_GROUPS = 5  # fewer cannot be split four to one
HASHES = "seen.safetensors"


@dataclass(frozen=True, eq=False)
class Splits:
    """The splits of one label table."""

    train: Outcomes
    choice: Outcomes
    """To choose each scorer's capacity on; after that the scorer learns from it as well."""
    ladder: Outcomes
    """To compare the scorers on."""
    calibration: Outcomes
    """To calibrate probabilities and choose the threshold on; nothing else uses it."""
    test: Outcomes
    """Used once, at the end."""
    how: str
    """How the choice split differs from the training split, in words."""

    def sizes(self) -> dict[str, int]:
        names = ("train", "choice", "ladder", "calibration", "test")
        return {name: len(getattr(self, name)) for name in names}


def split(outcomes: Outcomes, seed: int = 0) -> Splits:
    """Half of the labels to learn from, the rest to choose, calibrate and test on.

    The choice split has another wording than the training split if the labels have wordings, else
    other groups if there are enough, else prompts like it: a capacity that is chosen on similar
    prompts overfits them. All wordings of a question stay in one split; if that prevents a choice
    split of another wording, it has other groups or other questions.
    """
    if len(outcomes) < FEWEST:
        missing = FEWEST - len(outcomes)
        raise InvalidInput(
            f"{len(outcomes)} labels: a fit needs {FEWEST} or more, so label {missing:,} more "
            "prompts (`pliant route label` on a longer file asks only the new ones)"
        )
    fitted, ladder, calibration, test = outcomes.split((0.55, 0.15, 0.15, 0.15), seed)
    keys, how = _difference(fitted)
    train, choice = fitted.split((0.8, 0.2), seed) if keys is None else _apart(fitted, keys, seed)
    return Splits(train, choice, ladder, calibration, test, how)


def _difference(outcomes: Outcomes) -> tuple[tuple[str, ...] | None, str]:
    wordings, groups, questions = outcomes.wordings, outcomes.groups, outcomes.questions
    if wordings is not None and len(set(wordings)) > 1 and not _separated(questions, wordings):
        return wordings, "capacity is chosen on another wording than the scorers are trained on"
    if groups is not None and len(set(groups)) >= _GROUPS and not _separated(questions, groups):
        return groups, "capacity is chosen on other groups than the scorers are trained on"
    if questions is not None and len(set(questions)) < len(questions):
        return None, (
            "capacity is chosen on other questions than the scorers are trained on, in all their "
            "wordings: a split by wording or group would separate the wordings of a question"
        )
    return None, (
        "capacity is chosen on prompts like the training prompts: the labels have no wordings and "
        "too few groups to do better, so expect less on other prompts"
    )


def _separated(questions: tuple[str, ...] | None, keys: tuple[str, ...]) -> bool:
    """Whether a split by these keys would separate the wordings of a question."""
    if questions is None:
        return False
    return len(set(zip(questions, keys, strict=True))) > len(set(questions))


def _apart(outcomes: Outcomes, keys: tuple[str, ...], seed: int) -> tuple[Outcomes, Outcomes]:
    """The rows of most keys, and those of the others: a fifth of the rows or one key at least."""
    names = sorted(set(keys))
    np.random.default_rng(seed).shuffle(names)
    held: set[str] = set()
    for name in names[:-1]:
        held.add(name)
        if sum(key in held for key in keys) >= 0.2 * len(keys):
            break
    apart = np.array([key in held for key in keys])
    return outcomes.select(~apart), outcomes.select(apart)


# --- what a router was fitted on ------------------------------------------------------------------


def write_hashes(folder: Path, learned: Iterable[str], calibrated: Iterable[str]) -> None:
    """Store four bytes of each prompt's hash, which reveal nothing about its text.

    `learned` are the prompts that the scorer was trained or chosen on. `calibrated` are those that
    only its probabilities and threshold come from: a new threshold may use them again.
    """
    _write(folder, _hashes(learned), _hashes(calibrated))


def add_hashes(folder: Path, calibrated: Iterable[str]) -> None:
    """Add prompts that a threshold was chosen on."""
    learned, before = _read(folder)
    _write(folder, learned, np.concatenate([before, _hashes(calibrated)]))


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
