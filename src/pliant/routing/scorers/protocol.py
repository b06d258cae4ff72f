"""The protocol of scorers: fitted on a label table, they predict who gets a prompt right."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from pliant.errors import CorruptFile, InvalidInput
from pliant.files import locked, write_file
from pliant.routing.outcomes import Outcomes
from pliant.routing.prompts import Prompt
from pliant.stats import Floats, as_difference

if TYPE_CHECKING:
    from pliant.complexity import Complexity, Scores

Prompts = Sequence[Prompt]
Groups = Sequence[str] | None
Folds = Sequence[NDArray[np.int64]]
"""The rows of each fold; every row is in one of them."""
Partitions = Sequence[Folds]
"""Several divisions of the same rows into folds."""
TrainOn = Callable[[NDArray[np.int64]], Outcomes]
"""The table to train on, of these rows; it may hold other grades than the table of all rows."""

FORMAT = 1
INDEX, WEIGHTS = "scorer.json", "scorer.safetensors"


@dataclass(frozen=True, eq=False)
class Predictions:
    """One row a prompt, one column a model, in the order of the labels: the strongest last."""

    right: Floats | None
    """(n, m) P(model j is right); None for a scorer that predicts no probabilities."""
    gain: Floats
    """(n, m) P(model j is right) - P(the first is), in [-1, 1]; its first column is 0. It is an
    estimate of its own: many scorers fit the difference, which orders prompts better than the
    difference of two fits."""
    novel: NDArray[np.bool_] | None = None
    """(n,) whether a prompt is unlike all training prompts; None if novelty was not checked."""

    @property
    def score(self) -> Floats:
        """(n,) the probability that the prompt is hard for the first model."""
        if self.right is None:
            raise InvalidInput("this scorer orders prompts and predicts no probabilities")
        return 1.0 - self.right[:, 0]

    @property
    def last_gain(self) -> Floats:
        """(n,) of the strongest model over the first."""
        return self.gain[:, -1]

    def __len__(self) -> int:
        return len(self.gain)

    def select(self, rows: Any) -> Predictions:
        """Those of some of the prompts."""
        each = [None if x is None else x[rows] for x in (self.right, self.novel)]
        return Predictions(each[0], self.gain[rows], each[1])

    def check(self, outcomes: Outcomes, kind: str) -> None:
        """Refuse what is not one row a prompt, or no probabilities and differences of them."""
        shape, gain, right = outcomes.right.shape, np.asarray(self.gain), self.right
        for name, values in (("gain", gain), ("right", right)):
            if values is not None and np.shape(values) != shape:
                raise InvalidInput(
                    f"scorer {kind!r}: `{name}` has the shape {np.shape(values)}, for prompts and "
                    f"models {shape}"
                )
        if not (np.abs(gain) <= 1).all() or (gain[:, 0] != 0).any():
            raise InvalidInput(
                f"scorer {kind!r}: a gain is a difference of probabilities: in [-1, 1], and 0 in "
                "the first column (pliant.stats.as_difference presses fitted ones into that)"
            )
        if right is not None and not ((np.asarray(right) >= 0) & (np.asarray(right) <= 1)).all():
            raise InvalidInput(f"scorer {kind!r}: `right` must be probabilities, in [0, 1]")


def joined_predictions(parts: Sequence[Predictions]) -> Predictions:
    """The rows of several, one after the other; what one of them lacks is None."""
    rights = [part.right for part in parts if part.right is not None]
    novels = [part.novel for part in parts if part.novel is not None]
    return Predictions(
        np.concatenate(rights) if len(rights) == len(parts) else None,
        np.concatenate([part.gain for part in parts]),
        np.concatenate(novels) if len(novels) == len(parts) else None,
    )


@dataclass(frozen=True)
class Prefilling:
    """A scorer that is read in the prefill of its base model's own answer."""

    reader: Complexity
    predictions: Callable[[Scores], Predictions]
    """From the scores of that one prompt."""


@dataclass
class State:
    """What a fitted scorer saves: JSON settings, and arrays."""

    settings: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)


class Scorer(ABC):
    """Fitted once, then used to predict; saved as JSON and safetensors."""

    kind: ClassVar[str]
    needs_groups: ClassVar[bool] = False
    """Whether `predict` is useless without the prompts' groups."""
    saveable: ClassVar[bool] = True

    @abstractmethod
    def fit(self, train: Outcomes, choice: Outcomes | None = None, seed: int = 0) -> Self:
        """Learn from `train`; a scorer with hyperparameters chooses them on `choice`."""

    @abstractmethod
    def predict(self, prompts: Prompts, groups: Groups = None) -> Predictions:
        """One row for each prompt."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of the scorers that predict: its own, or those of its members."""
        return (self.kind,)

    def vectors(self, prompts: Prompts) -> Floats | None:
        """(n, width) for the detector of novel prompts, of a scorer of your own that embeds them.
        None of Pliant's own offers any: it would read each prompt twice."""
        return None

    def cross_validate(
        self, outcomes: Outcomes, partitions: Partitions, seed: int = 0
    ) -> Predictions:
        """Each prompt as a fit on the other folds predicts it, the mean over the partitions.

        Leaves the settings that did best, which the next `fit` uses. A scorer whose features can
        be computed once for all fits has a faster one of its own.
        """
        return self.out_of_fold(outcomes, partitions, outcomes.select, seed)

    def out_of_fold(
        self, outcomes: Outcomes, partitions: Partitions, train_on: TrainOn, seed: int = 0
    ) -> Predictions:
        """Each prompt as a fit on `train_on(rows of the other folds)` predicts it, the mean over
        the partitions; by the settings that a `cross_validate` left, where it has been called."""
        each = [self._out_of_fold(outcomes, folds, train_on, seed) for folds in partitions]
        rights = [predictions.right for predictions in each if predictions.right is not None]
        right = np.mean(rights, axis=0) if rights else None
        return Predictions(right, np.mean([predictions.gain for predictions in each], axis=0))

    def _out_of_fold(
        self, outcomes: Outcomes, folds: Folds, train_on: TrainOn, seed: int
    ) -> Predictions:
        gain = np.zeros_like(outcomes.right)
        right: Floats | None = np.zeros_like(gain)
        for fold in folds:
            rest = train_on(np.setdiff1d(np.arange(len(outcomes)), fold))
            fitted, held = deepcopy(self).fit(rest, None, seed), outcomes.select(fold)
            predictions = fitted.predict(held.asked, held.groups)
            predictions.check(held, self.kind)
            # The mean of the rest is lower where the fold's is higher: without this, prompts of
            # different folds would be ordered the wrong way round by it.
            shift = outcomes.right.mean(axis=0) - rest.right.mean(axis=0)
            gain[fold] = as_difference(predictions.gain + gains(shift[None]))
            if right is None or predictions.right is None:
                right = None
            else:
                right[fold] = np.clip(predictions.right + shift, 0, 1)
        return Predictions(right, gain)

    def state(self) -> State:
        """All that `load_state` needs."""
        raise InvalidInput(f"a scorer of kind {self.kind!r} is not saved")

    def load_state(self, state: State) -> None:
        """Become the scorer that `state` was saved from."""
        raise InvalidInput(f"a scorer of kind {self.kind!r} is not saved")

    def flops(self, prompts: Prompts) -> float:
        """The mean cost of scoring one of these prompts; negligible for one without a model."""
        return 0.0

    def chosen(self) -> dict[str, Any]:
        """The hyperparameters chosen on the choice split, for people to read."""
        return {}

    def save(self, folder: Path) -> None:
        """Write the scorer to a folder, for `pliant.routing.scorers.load`."""
        state = self.state()
        weights = _content(state.arrays)
        index = {"format": FORMAT, "kind": self.kind, "settings": state.settings}
        index["digest"] = _digest(state.settings, weights)
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            write_file(folder / WEIGHTS, weights)
            write_file(folder / INDEX, json.dumps(index, ensure_ascii=False).encode())

    @classmethod
    def load(cls, folder: Path) -> Self:
        """A saved scorer, ready to predict."""
        scorer = cls()
        scorer.load_state(read_state(folder, cls.kind))
        return scorer


def read_index(folder: Path) -> Mapping[str, Any]:
    """The index of a scorer's folder: format, kind and settings."""
    path = folder / INDEX
    try:
        index: Mapping[str, Any] = json.loads(path.read_bytes())
        if index["format"] > FORMAT:
            raise CorruptFile(f"{path}: of format {index['format']}; this Pliant reads {FORMAT}")
        if not isinstance(index["kind"], str) or not isinstance(index["settings"], dict):
            raise TypeError("no kind or no settings")
    except FileNotFoundError:
        raise CorruptFile(f"{folder}: holds no {INDEX}, so no scorer") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptFile(f"{path}: not what Pliant writes ({error})") from error
    return index


def read_state(folder: Path, kind: str) -> State:
    """The saved state of a scorer of this kind."""
    index = read_index(folder)
    if index["kind"] != kind:
        raise CorruptFile(f"{folder}: holds a scorer of kind {index['kind']!r}, not {kind!r}")
    arrays, stored = read_arrays(folder / WEIGHTS), index.get("digest")
    if stored is not None:  # Pliant 0.1 wrote none
        now = _digest(index["settings"], (folder / WEIGHTS).read_bytes())
        if stored != now:
            raise CorruptFile(
                f"{folder}: {INDEX} or {WEIGHTS} has been changed since Pliant wrote them: fit the "
                "router again, or put the files back"
            )
    return State(dict(index["settings"]), arrays)


def _digest(settings: Mapping[str, Any], weights: bytes) -> str:
    """Of all that a scorer is made from: where a part of it has changed, numbers would be wrong."""
    return hashlib.sha256(json.dumps(settings).encode() + weights).hexdigest()


def write_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write a safetensors file, atomically."""
    write_file(path, _content(arrays))


def _content(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    content: bytes = save_tensors({k: np.ascontiguousarray(x) for k, x in arrays.items()})
    return content


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Read what `write_arrays` wrote."""
    try:
        arrays = dict(load_tensors(path.read_bytes()))
    except FileNotFoundError:
        raise CorruptFile(f"{path}: missing") from None
    except (SafetensorError, ValueError) as error:
        raise CorruptFile(f"{path}: truncated or damaged ({error})") from error
    for name, array in arrays.items():
        if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
            raise CorruptFile(f"{path}: {name} holds NaN or infinity: its fit had failed")
    return arrays


def gains(values: Floats) -> Floats:
    """(n, m) each model minus the first: what gain means."""
    return values - values[:, :1]
