"""Scorers on vectors that a model computes of each prompt: read once, fitted on many times.

A reader turns prompts into vectors, one for each of a few layers. A head is a fit on the vectors of
one layer. Layer, head and strength are chosen together, by the error of the predicted gain on
prompts that the fit has not seen.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from pliant.errors import WrongBase
from pliant.linear import Linear, logistic, ridge
from pliant.routing.outcomes import Outcomes
from pliant.routing.prompts import digest
from pliant.routing.scorers.baselines import Nearest
from pliant.routing.scorers.linear import gain_error, together
from pliant.routing.scorers.protocol import (
    Folds,
    Groups,
    Partitions,
    Predictions,
    Prompts,
    Scorer,
    State,
    TrainOn,
    gains,
)
from pliant.stats import Floats, as_difference

Vectors = NDArray[np.float32]

_FEW = 1_000
"""With no more prompts, candidates are compared on all partitions, otherwise on the first alone."""
_PATIENCE = 2
"""How many weaker penalties in a row may be worse before the rest of them is left out."""


class Reader(ABC):
    """Turns prompts into vectors, and remembers those of the prompts that it was asked to."""

    name: str

    def __init__(self) -> None:
        self._rows: dict[str, Vectors] = {}

    @property
    @abstractmethod
    def layers(self) -> tuple[int, ...]:
        """The layers after which it can read, the first ones first."""

    @property
    @abstractmethod
    def model(self) -> Any:
        """The model, for its fingerprint."""

    @abstractmethod
    def compute(self, prompts: Prompts, layers: Sequence[int]) -> Vectors:
        """(n, len(layers), D)"""

    @abstractmethod
    def flops(self, prompts: Prompts, layer: int) -> float:
        """The mean cost of reading one of these prompts as far as this layer."""

    def remember(self, prompts: Prompts) -> None:
        """Read the prompts that were not read before; every later `read` of them is free."""
        new = {key: prompt for prompt in prompts if (key := digest(prompt)) not in self._rows}
        if new:
            rows = self.compute(list(new.values()), self.layers)
            self._rows |= dict(zip(new, rows, strict=True))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Itself: a model is never copied with the scorer that reads it."""
        return self

    def forget(self) -> None:
        self._rows.clear()

    @contextmanager
    def forgetful(self) -> Iterator[None]:
        """Read everything anew, as of prompts that were never read: to time it."""
        rows, self._rows = self._rows, {}
        try:
            yield
        finally:
            self._rows = rows

    def read(self, prompts: Prompts, layer: int) -> Vectors:
        """(n, D): the prompts' vectors after this layer."""
        keys = [digest(prompt) for prompt in prompts]
        new = {k: p for k, p in zip(keys, prompts, strict=True) if k not in self._rows}
        computed: dict[str, Vectors] = {}
        if new:
            vectors = self.compute(list(new.values()), [layer])[:, 0]
            computed = dict(zip(new, vectors, strict=True))
        at = self.layers.index(layer) if len(computed) < len(set(keys)) else 0
        rows = [computed[k] if k in computed else self._rows[k][at] for k in keys]
        return np.stack(rows) if rows else np.zeros((0, 0), np.float32)


@dataclass(frozen=True)
class Candidate:
    """What is fitted: a kind of head, with its strength, on the vectors after a layer."""

    layer: int
    head: str = "logistic"
    strength: float = 0.1


STRENGTHS: dict[str, tuple[float, ...]] = {
    # Penalty, share of the data's weight, neighbors; the smoothest fit first. The vectors are
    # standardised: on half of GSM8K (660 prompts) MiniLM's APGR is .582, .598, .608, .614, .615
    # for penalties from 300 to 30,000, and .558, .609, .615, .616 for 10 to 300 neighbors.
    "ridge": (100_000.0, 30_000.0, 10_000.0, 3_000.0, 1_000.0, 300.0, 100.0),
    # On a real model 1e-4 to 1e-2 is best, on nano-s 0.1 and more.
    "logistic": (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0),
    "knn": (300, 100, 30, 10),
}


@dataclass(frozen=True, eq=False)
class Head:
    """A fit on standardised vectors."""

    kind: str
    mean: Floats
    std: Floats
    fitted: Linear | Nearest

    @classmethod
    def fit(cls, x: Vectors, right: Floats, kind: str, strength: float) -> Head:
        values = x.astype(np.float64)
        mean, std = values.mean(axis=0), values.std(axis=0) + 1e-6
        z = (values - mean) / std
        if kind == "knn":
            return cls(kind, mean, std, Nearest(_unit(z), right, int(strength)))
        fitted = ridge(z, right, strength) if kind == "ridge" else logistic(z, right, strength)
        return cls(kind, mean, std, fitted)

    def __call__(self, x: Vectors) -> Predictions:
        z = (x - self.mean) / self.std
        right = self.fitted(_unit(z) if self.kind == "knn" else z)
        gain = as_difference(gains(right)) if self.kind == "ridge" else gains(right)
        return Predictions(np.clip(right, 0.0, 1.0), gain)

    def arrays(self) -> dict[str, NDArray[Any]]:
        own: dict[str, NDArray[Any]] = {"mean": self.mean, "std": self.std}
        if isinstance(self.fitted, Linear):
            return own | {k: v.astype(np.float32) for k, v in self.fitted.arrays().items()}
        vectors = self.fitted.vectors.astype(np.float16)
        return own | {"vectors": vectors, "right": self.fitted.right.astype(np.float32)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Any], kind: str, strength: float) -> Head:
        fitted: Linear | Nearest
        if kind == "knn":
            vectors = arrays["vectors"].astype(np.float64)
            fitted = Nearest(vectors, arrays["right"].astype(np.float64), int(strength))
        else:
            fitted = Linear.from_arrays(arrays, logistic=kind == "logistic")
        return cls(kind, arrays["mean"], arrays["std"], fitted)


def _unit(z: Floats) -> Floats:
    return z / np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-9)


class VectorScorer(Scorer):
    """A head on a reader's vectors."""

    heads: tuple[str, ...]
    """The kinds of heads that are tried."""
    owns_reader: bool = True
    """Whether nothing else uses the reader, so that it may forget what was fitted on."""
    strengths: ClassVar[Mapping[str, Sequence[float]]] = STRENGTHS
    noun: ClassVar[str]
    """What the scorer is called in an error."""
    head: Head

    def __init__(self) -> None:
        self.candidate: Candidate | None = None
        """What was chosen; None before that."""
        self.trained_on: dict[str, Any] | None = None
        """The fingerprint of the model that it read; None in older files."""
        self._checked = False

    @property
    @abstractmethod
    def reader(self) -> Reader:
        """What it fits on."""

    def cross_validate(
        self, outcomes: Outcomes, partitions: Partitions, seed: int = 0
    ) -> Predictions:
        """As every scorer's; the prompts are read once, for all fits and for the next `fit`.

        Candidates are compared on all partitions of up to _FEW prompts, otherwise on the first.
        """
        trial, few = self._trial(outcomes), len(outcomes) <= _FEW
        self.candidate = self._best(trial, partitions if few else partitions[:1])
        return self.out_of_fold(outcomes, partitions, outcomes.select, seed)

    def _out_of_fold(
        self, outcomes: Outcomes, folds: Folds, train_on: TrainOn, seed: int
    ) -> Predictions:
        candidate = self.candidate or self._default()
        return self._trial(outcomes).held_out(folds, candidate, train_on)

    def fit(self, train: Outcomes, choice: Outcomes | None = None, seed: int = 0) -> Self:
        from pliant.adapters import fingerprint

        everything = together(train, choice)
        if choice is not None:
            held = np.arange(len(train), len(everything))
            self.candidate = self._best(self._trial(everything), [[held]])
        chosen = self.candidate = self.candidate or self._default()
        x = self.reader.read(everything.asked, chosen.layer)
        self.head = Head.fit(x, everything.right, chosen.head, chosen.strength)
        self.trained_on, self._checked = asdict(fingerprint(self.reader.model)), True
        if self.owns_reader:
            self.reader.forget()
        return self

    def predict(self, prompts: Prompts, groups: Groups = None) -> Predictions:
        assert self.candidate is not None, "not fitted"
        self._check_base()
        return self.head(self.reader.read(prompts, self.candidate.layer))

    def flops(self, prompts: Prompts) -> float:
        layer = self.reader.layers[-1] if self.candidate is None else self.candidate.layer
        return self.reader.flops(prompts, layer)

    def state(self) -> State:
        settings = {**self.chosen(), "fingerprint": self.trained_on}
        return State(settings, self.head.arrays())

    def load_state(self, state: State) -> None:
        settings = state.settings
        kind, strength = settings.get("head", "logistic"), settings["strength"]
        self.candidate = Candidate(settings["layer"], kind, strength)
        self.trained_on = settings.get("fingerprint")
        self.head = Head.from_arrays(state.arrays, kind, strength)

    # --- the choice -------------------------------------------------------------------------------

    def _default(self) -> Candidate:
        """Where nothing was compared: the deepest layer, and a strength from the middle."""
        kind = self.heads[0]
        strengths = self.strengths[kind]
        return Candidate(self.reader.layers[-1], kind, strengths[len(strengths) // 2])

    def _trial(self, outcomes: Outcomes) -> _Trial:
        self.reader.remember(outcomes.asked)
        vectors = {k: self.reader.read(outcomes.asked, k) for k in self.reader.layers}
        return _Trial(outcomes, vectors)

    def _best(self, trial: _Trial, partitions: Partitions) -> Candidate:
        errors: dict[Candidate, float] = {}
        for path in self._paths():
            best, worse = np.inf, 0
            for candidate in path:
                error = float(np.mean([trial.error(folds, candidate) for folds in partitions]))
                errors[candidate] = error
                worse = 0 if error < best else worse + 1
                best = min(best, error)
                if worse == _PATIENCE:
                    break
        return min(errors, key=lambda candidate: errors[candidate])

    def _paths(self) -> Iterator[list[Candidate]]:
        """The candidates of one layer and kind, the smoothest fit first."""
        for layer in self.reader.layers:
            for kind in self.heads:
                yield [Candidate(layer, kind, strength) for strength in self.strengths[kind]]

    def _check_base(self) -> None:
        """When it first reads its model, for loading a router loads no model."""
        if not self._checked:
            check_base(self.reader, self.trained_on, self.noun)
            self._checked = True


def check_base(reader: Reader, trained_on: Mapping[str, Any] | None, noun: str) -> None:
    """Refuse another model than the one that a scorer was fitted on."""
    from pliant.adapters import Fingerprint, fingerprint

    if trained_on is None:
        return
    expected = Fingerprint(**trained_on)
    if differences := expected.differences(fingerprint(reader.model)):
        raise WrongBase(
            f"{reader.name}: {noun} was fitted on another base "
            f"({expected.name or 'a'} {expected.model}): {differences}. Name its own base, "
            "or fit it again"
        )


@dataclass(frozen=True, eq=False)
class _Trial:
    """Prompts with their vectors after each layer, on which candidates are compared."""

    outcomes: Outcomes
    vectors: Mapping[int, Vectors]

    def error(self, folds: Folds, candidate: Candidate) -> float:
        """Of the gain that is predicted for the rows of the folds."""
        rows = np.concatenate([np.asarray(fold) for fold in folds])
        gain = self.held_out(folds, candidate).gain[rows]
        return gain_error(gain, self.outcomes.select(rows))

    def held_out(
        self, folds: Folds, candidate: Candidate, train_on: TrainOn | None = None
    ) -> Predictions:
        """The rows of each fold, as a fit on all others predicts them; 0 for rows in no fold."""
        x, right = self.vectors[candidate.layer], self.outcomes.right
        probability, gain = np.zeros_like(right), np.zeros_like(right)
        for fold in folds:
            rest = np.setdiff1d(np.arange(len(right)), fold)
            known = right[rest] if train_on is None else train_on(rest).right
            head = Head.fit(x[rest], known, candidate.head, candidate.strength)
            held = head(x[fold])
            assert held.right is not None
            shift = right.mean(axis=0) - known.mean(axis=0)  # as in Scorer.cross_validate
            probability[fold] = np.clip(held.right + shift, 0, 1)
            gain[fold] = as_difference(held.gain + gains(shift[None]))
        return Predictions(probability, gain)
