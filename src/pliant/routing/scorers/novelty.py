"""Is a prompt unlike the prompts that the router was fitted on? Then it gets the safe default.

The most common 5-grams of characters of the training prompts are stored as bits of a table. A
prompt is novel if the table contains a smaller share of its 5-grams than of nearly all held-out
prompts. This detects another language, notation or subject; it cannot detect another intention in
the same vocabulary.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from pliant.errors import CorruptFile
from pliant.routing.outcomes import Outcomes
from pliant.routing.prompts import Prompt, text_of
from pliant.routing.scorers.protocol import (
    Groups,
    Predictions,
    Prefilling,
    Prompts,
    Scorer,
    read_arrays,
    write_arrays,
)

NOVELTY = "familiar.safetensors"
"""The file beside a scorer that detects novel prompts."""
_LENGTH, _MOST_COMMON = 5, 20_000
_BITS = 2**18  # 32 KB, of which at most 8 % are set: few 5-grams match by accident
_FALSE_ALARMS = 0.005
"""The share of held-out prompts that counts as novel."""
_DIGIT, _SPACE = re.compile(r"\d"), re.compile(r"\s+")


class NoveltyDetector:
    """The table of 5-grams, and the share of a prompt's 5-grams that it must contain."""

    def __init__(self, table: NDArray[np.bool_], bound: float) -> None:
        self.table, self.bound = table, bound

    @classmethod
    def fit(cls, train: Sequence[Prompt], held_out: Sequence[Prompt]) -> NoveltyDetector:
        """The 5-grams of `train`; the bound from prompts that are not in it."""
        counts = Counter(gram for prompt in train for gram in _grams(prompt))
        table = np.zeros(_BITS, dtype=np.bool_)
        table[[_bit(gram) for gram, _ in counts.most_common(_MOST_COMMON)]] = True
        detector = cls(table, 0.0)
        detector.bound = float(np.quantile(detector.share(held_out), _FALSE_ALARMS))
        return detector

    def share(self, prompts: Prompts) -> NDArray[np.float64]:
        """(n,) the share of each prompt's 5-grams that the table contains."""
        bits = ([_bit(gram) for gram in _grams(prompt)] for prompt in prompts)
        return np.array([self.table[at].mean() for at in bits])

    def novel(self, prompts: Prompts) -> NDArray[np.bool_]:
        """(n,) whether a prompt is unlike the training prompts."""
        return self.share(prompts) < self.bound

    def save(self, folder: Path) -> None:
        arrays = {"known": np.packbits(self.table), "bound": np.array([self.bound])}
        write_arrays(folder / NOVELTY, arrays)

    @classmethod
    def load(cls, folder: Path) -> NoveltyDetector:
        arrays = read_arrays(folder / NOVELTY)
        known, bound = arrays.get("known"), arrays.get("bound")
        if (
            known is None
            or known.dtype != np.uint8
            or known.size * 8 != _BITS
            or bound is None
            or bound.shape != (1,)
        ):
            raise CorruptFile(f"{folder / NOVELTY}: not what Pliant writes")
        return cls(np.unpackbits(known).astype(np.bool_), float(bound[0]))


def _grams(prompt: Prompt) -> set[str]:
    """The text's 5-grams, with every digit as 0 and each run of white space as one space."""
    text = f" {_SPACE.sub(' ', _DIGIT.sub('0', text_of(prompt).lower()))} "
    return {text[i : i + _LENGTH] for i in range(max(1, len(text) - _LENGTH + 1))}


def _bit(gram: str) -> int:
    return zlib.crc32(gram.encode("utf-8", "replace")) % _BITS


class WithNovelty(Scorer):
    """A scorer of any kind that also predicts which prompts are novel; it keeps that kind."""

    kind = "with novelty"

    def __init__(self, scorer: Scorer, detector: NoveltyDetector) -> None:
        self.scorer, self.detector = scorer, detector
        self.kind = scorer.kind  # type: ignore[misc]
        self.needs_groups = scorer.needs_groups  # type: ignore[misc]

    def fit(self, train: Outcomes, choice: Outcomes | None = None, seed: int = 0) -> Self:
        self.scorer.fit(train, choice, seed)
        return self

    def predict(self, prompts: Prompts, groups: Groups = None) -> Predictions:
        return replace(self.scorer.predict(prompts, groups), novel=self.detector.novel(prompts))

    def while_answering(self, prompt: Prompt) -> Prefilling | None:
        """The inner scorer's offer, if it reads a model that answers."""
        offer = getattr(self.scorer, "while_answering", None)
        inner: Prefilling | None = None if offer is None else offer(prompt)
        if inner is None:
            return None
        predictions = inner.predictions
        return replace(
            inner,
            predictions=lambda scores: replace(
                predictions(scores), novel=self.detector.novel([prompt])
            ),
        )

    def flops(self, prompts: Prompts) -> float:
        return self.scorer.flops(prompts)

    def chosen(self) -> dict[str, Any]:
        return self.scorer.chosen()

    def save(self, folder: Path) -> None:
        self.scorer.save(folder)
        self.detector.save(folder)
