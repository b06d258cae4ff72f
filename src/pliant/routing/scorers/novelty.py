"""Is a prompt unlike the prompts that the router was fitted on? Then it gets the safe default.

    detector = NoveltyDetector.fit(outcomes, partitions)
    detector.novel(prompts)           # (n,) flags
    detector.out_of_fold              # the flags of the labels' own prompts

A prompt is compared with the training prompts that are nearest to it: in its words, in its surface
(lengths, digits, lines), and in vectors of a scorer that offers some (`Scorer.vectors`). What is
near depends on the task: prompts of one template differ by a number, while essays share few words.
So a distance is measured against the distances that the training prompts around the nearest one
have from theirs, out of fold. The share of training prompts that are at least as distant is the
evidence of one space, and the product of these shares the evidence of all (Fisher's method).

Left out: one scale for all prompts, which notices fewer tasks (benchmarks/unseen_tasks.py); a gain
for the default model that grows with the distance, which breaks the goal on known prompts; and a
classifier of left-out tasks, which was no better than the product. A task whose prompts look like
those of another, and differ in what they ask for, is not noticed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from pliant.errors import CorruptFile
from pliant.routing.outcomes import Outcomes
from pliant.routing.prompts import text_of
from pliant.routing.scorers.neighbours import Space, Surface, Vectors, Words
from pliant.routing.scorers.protocol import (
    Folds,
    Partitions,
    Predictions,
    Prompts,
    Scorer,
    read_arrays,
    write_arrays,
)
from pliant.routing.scorers.wrapper import Wrapper
from pliant.stats import Floats

NOVELTY = "novelty.safetensors"
"""The file beside a scorer that detects novel prompts."""
FALSE_ALARMS = 0.02
"""The share of known prompts that may count as novel."""
# benchmarks/unseen_tasks.py, nano: .5 % finds 83 % of the left-out prompts, at .49 of the cost of
# always the default on known ones; 2 % 87 % at .51; 5 % 89 % at .53; 20 % 90 % at .60.
_STORED = 4_000
"""At most so many training prompts are compared with: 3 MB, and a millisecond a prompt."""
_NEAREST, _AROUND = 3, 20
"""A distance is the mean over so many nearest prompts; its scale comes from so many around them."""
PRIOR = 5.0
"""The number of prompts that all stored ones count for in the scale around one of them."""
_TAIL = 0.1
"""The share of training prompts that the tail of distances is fitted to."""
_BLOCK = 512
"""Rows of the table of distances in memory."""
_SPACES: dict[str, type[Words] | type[Surface] | type[Vectors]] = {
    "words": Words,
    "surface": Surface,
    "vectors": Vectors,
}


class Detector(Protocol):
    """What `WithNovelty` needs."""

    reads_vectors: bool
    """Whether `novel` needs the scorer's vectors."""

    def novel(self, prompts: Prompts, vectors: Floats | None = None) -> NDArray[np.bool_]: ...

    def save(self, folder: Path) -> None: ...


class NoveltyDetector:
    """The stored prompts in each space, and how distant a prompt must be to count as novel."""

    known: Floats
    """(n,) the surprise of each prompt of the labels for a fit on the other folds; not saved."""

    def __init__(
        self, spaces: Mapping[str, Space], scales: Mapping[str, Scale], bound: float
    ) -> None:
        self.spaces, self.scales, self.bound = spaces, scales, bound
        self.reads_vectors = "vectors" in spaces

    @classmethod
    def fit(
        cls,
        outcomes: Outcomes,
        partitions: Partitions,
        seed: int = 0,
        vectors: Floats | None = None,
        false_alarms: float = FALSE_ALARMS,
        prior: float = PRIOR,
    ) -> Self:
        """Compare each prompt with those of the other folds of the first partition.

        `vectors` are the scorer's own of these prompts, (n, width). The larger `prior`, the more
        the scale around a stored prompt is that of all.
        """
        texts, fold = [text_of(prompt) for prompt in outcomes.asked], _fold_of(partitions[0])
        stored = np.sort(np.random.default_rng(seed).permutation(len(texts))[:_STORED])
        spaces: dict[str, Space] = {
            "words": Words.fit(texts, stored),
            "surface": Surface.fit(texts, stored),
        }
        if vectors is not None:
            spaces["vectors"] = Vectors.fit(vectors, stored)
        scales = {
            name: Scale.fit(space, _inputs(name, texts, vectors), stored, fold, prior)
            for name, space in spaces.items()
        }
        known = np.sum([scale.surprise(scale.known) for scale in scales.values()], axis=0)
        detector = cls(spaces, scales, float(np.quantile(known, 1 - false_alarms)))
        detector.known = known
        return detector

    @property
    def out_of_fold(self) -> NDArray[np.bool_]:
        """(n,) which prompts of the labels count as novel for a fit on the other folds."""
        return self.known > self.bound

    def surprise(self, prompts: Prompts, vectors: Floats | None = None) -> Floats:
        """(n,) how unlike the training prompts: -log of the product of the shares of these that
        are at least as distant."""
        texts, total = [text_of(prompt) for prompt in prompts], np.zeros(len(prompts))
        for name, scale in self.scales.items():
            inputs = _inputs(name, texts, vectors)
            total += scale.surprise(scale.distance(self.spaces[name], inputs))
        return total

    def novel(self, prompts: Prompts, vectors: Floats | None = None) -> NDArray[np.bool_]:
        """(n,) whether a prompt is unlike the training prompts."""
        return self.surprise(prompts, vectors) > self.bound

    def save(self, folder: Path) -> None:
        arrays = {"bound": np.array([self.bound])}
        for name, space in self.spaces.items():
            parts = space.arrays() | self.scales[name].arrays()
            arrays |= {f"{name}.{key}": array for key, array in parts.items()}
        write_arrays(folder / NOVELTY, arrays)

    @classmethod
    def load(cls, folder: Path) -> Self:
        arrays = read_arrays(folder / NOVELTY)
        names = [name for name in _SPACES if f"{name}.scale.mean" in arrays]
        try:
            if "words" not in names:
                raise KeyError("words.scale.mean")
            own = {name: _with_prefix(arrays, f"{name}.") for name in names}
            spaces = {name: _SPACES[name].from_arrays(own[name]) for name in names}
            scales = {name: Scale.from_arrays(own[name]) for name in names}
            if len({len(scale.mean) for scale in scales.values()}) > 1:
                raise ValueError("its spaces store different numbers of prompts")
            for name in names:
                if spaces[name].stored != len(scales[name].mean):
                    raise ValueError(f"{name}: a scale for each stored prompt is missing")
            (bound,) = arrays["bound"].tolist()
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptFile(f"{folder / NOVELTY}: not what Pliant writes ({error})") from error
        return cls(spaces, scales, float(bound))


@dataclass(frozen=True, eq=False)
class Scale:
    """What distance is usual in one space, around each stored prompt."""

    mean: Floats
    """(stored,) of the distances of the training prompts around it."""
    std: Floats
    known: Floats
    """(n,) the distances of the training prompts themselves, in standard deviations."""

    @classmethod
    def fit(
        cls,
        space: Space,
        inputs: Any,
        stored: NDArray[np.int64],
        fold: NDArray[np.int64],
        prior: float,
    ) -> Self:
        distance, nearest = np.zeros(len(fold)), np.zeros(len(fold), dtype=np.int64)
        around = np.zeros((len(stored), min(_AROUND, len(stored))), dtype=np.int64)
        for rows in _blocks(len(fold)):
            table = space.distances(inputs[rows])
            here = np.flatnonzero(np.isin(stored, np.arange(len(fold))[rows]))
            around[here] = _nearest(table[stored[here] - rows.start], around.shape[1])[0]
            table[fold[rows, None] == fold[stored]] = np.inf
            order, distance[rows] = _nearest(table, _NEAREST)
            nearest[rows] = order[:, 0]
        mean, std = _moments(distance[stored], around, prior)
        return cls(mean, std, (distance - mean[nearest]) / std[nearest])

    def distance(self, space: Space, inputs: Any) -> Floats:
        """(n,) in standard deviations."""
        result = np.zeros(len(inputs))
        for rows in _blocks(len(inputs)):
            order, distance = _nearest(space.distances(inputs[rows]), _NEAREST)
            result[rows] = (distance - self.mean[order[:, 0]]) / self.std[order[:, 0]]
        return result

    def surprise(self, distance: Floats) -> Floats:
        """(n,) -log of the share of training prompts that are at least as distant; beyond nearly
        all of these it goes on as an exponential tail, so that one space can be evidence enough."""
        known, start, excess = self._tail
        fewer = np.searchsorted(known, distance, side="left")
        share = (1 + len(known) - fewer) / (1 + len(known))
        tail = -np.log(_TAIL) + (distance - start) / excess
        return np.where(distance > start, tail, -np.log(np.maximum(share, _TAIL)))

    @cached_property
    def _tail(self) -> tuple[Floats, float, float]:
        """The distances in order, where their tail begins, and its mean excess over that."""
        known = np.sort(self.known)
        start = float(np.quantile(known, 1 - _TAIL))
        excess = np.maximum(known - start, 0.0).mean() / _TAIL
        return known, start, max(float(excess), 0.1)

    def arrays(self) -> dict[str, NDArray[Any]]:
        return {f"scale.{f.name}": getattr(self, f.name) for f in fields(self)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Self:
        names = ("scale.mean", "scale.std", "scale.known")
        mean, std, known = (np.asarray(arrays[name], dtype=np.float64) for name in names)
        if mean.ndim != 1 or std.shape != mean.shape or known.ndim != 1 or not len(known):
            raise ValueError(f"scales of the shapes {mean.shape}, {std.shape} and {known.shape}")
        if not all(np.isfinite(x).all() for x in (mean, std, known)) or not (std > 0).all():
            raise ValueError("a scale must be finite and above 0")
        return cls(mean, std, known)


def _inputs(name: str, texts: Sequence[str], vectors: Floats | None) -> Any:
    """What a space compares: the texts, or the scorer's vectors."""
    if name != "vectors":
        return texts
    assert vectors is not None and len(vectors) == len(texts), "the detector reads vectors"
    return np.asarray(vectors)


def _fold_of(folds: Folds) -> NDArray[np.int64]:
    """(n,) the fold of each row."""
    fold = np.zeros(sum(map(len, folds)), dtype=np.int64)
    for i, rows in enumerate(folds):
        fold[rows] = i
    return fold


def _blocks(n: int) -> list[slice]:
    return [slice(start, min(start + _BLOCK, n)) for start in range(0, n, _BLOCK)]


def _nearest(table: Floats, k: int) -> tuple[NDArray[np.int64], Floats]:
    """(n, k) the nearest stored prompts, the nearest first, and (n,) their mean distance; an
    infinite one does not count."""
    k = min(k, table.shape[1])
    some = np.argpartition(table, k - 1, axis=1)[:, :k]
    distances = np.take_along_axis(table, some, axis=1)
    order = np.argsort(distances, axis=1)
    counts = np.isfinite(distances)
    mean = np.where(counts, distances, 0.0).sum(axis=1) / np.maximum(counts.sum(axis=1), 1)
    return np.take_along_axis(some, order, axis=1), mean


def _moments(distance: Floats, around: NDArray[np.int64], prior: float) -> tuple[Floats, Floats]:
    """(stored,) mean and standard deviation around each stored prompt, shrunk to those of all."""
    values, weight = distance[around], around.shape[1] + prior
    mean = (values.sum(axis=1) + prior * distance.mean()) / weight
    squares = ((values - mean[:, None]) ** 2).sum(axis=1) + prior * distance.var()
    return mean, np.maximum(np.sqrt(squares / weight), 1e-6)


def _with_prefix(arrays: Mapping[str, NDArray[Any]], prefix: str) -> dict[str, NDArray[Any]]:
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


class WithNovelty(Wrapper):
    """A scorer of any kind that also predicts which prompts are novel."""

    def __init__(self, scorer: Scorer, detector: Detector) -> None:
        super().__init__(scorer)
        self.detector = detector

    def change(self, prompts: Prompts, predictions: Predictions) -> Predictions:
        if self.detector.reads_vectors:
            vectors = self.scorer.vectors(prompts)
            return replace(predictions, novel=self.detector.novel(prompts, vectors))
        return replace(predictions, novel=self.detector.novel(prompts))

    def save(self, folder: Path) -> None:
        self.scorer.save(folder)
        self.detector.save(folder)
