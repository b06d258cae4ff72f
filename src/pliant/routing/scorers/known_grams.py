"""The novelty check of routers that were fitted before Pliant compared prompts with neighbours.

The most common 5-grams of characters of the training prompts are stored as bits of a table. A
prompt is novel if the table contains a smaller share of its 5-grams than of nearly all held-out
prompts. It is no longer fitted: it notices another language or notation and no other task.
"""

from __future__ import annotations

import re
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pliant.errors import CorruptFile
from pliant.routing.prompts import Prompt, text_of
from pliant.routing.scorers.protocol import Prompts, read_arrays, write_arrays
from pliant.stats import Floats

KNOWN_GRAMS = "familiar.safetensors"
"""The file beside a scorer."""
LENGTH, BITS = 5, 2**18
_DIGIT, _SPACE = re.compile(r"\d"), re.compile(r"\s+")


class KnownGrams:
    """The table of 5-grams, and the share of a prompt's 5-grams that it must contain."""

    reads_vectors = False

    def __init__(self, table: NDArray[np.bool_], bound: float) -> None:
        self.table, self.bound = table, bound

    def share(self, prompts: Prompts) -> Floats:
        """(n,) the share of each prompt's 5-grams that the table contains."""
        return np.array([self.table[bits(prompt)].mean() for prompt in prompts])

    def novel(self, prompts: Prompts, vectors: Floats | None = None) -> NDArray[np.bool_]:
        """(n,) whether a prompt is unlike the training prompts."""
        return self.share(prompts) < self.bound

    def save(self, folder: Path) -> None:
        arrays = {"known": np.packbits(self.table), "bound": np.array([self.bound])}
        write_arrays(folder / KNOWN_GRAMS, arrays)

    @classmethod
    def load(cls, folder: Path) -> KnownGrams:
        arrays = read_arrays(folder / KNOWN_GRAMS)
        known, bound = arrays.get("known"), arrays.get("bound")
        if (
            known is None
            or known.dtype != np.uint8
            or known.size * 8 != BITS
            or bound is None
            or bound.shape != (1,)
        ):
            raise CorruptFile(f"{folder / KNOWN_GRAMS}: not what Pliant writes")
        return cls(np.unpackbits(known).astype(np.bool_), float(bound[0]))


def bits(prompt: Prompt) -> list[int]:
    """The bit of each 5-gram, with every digit as 0 and each run of white space as one space."""
    text = f" {_SPACE.sub(' ', _DIGIT.sub('0', text_of(prompt).lower()))} "
    grams = {text[i : i + LENGTH] for i in range(max(1, len(text) - LENGTH + 1))}
    return [zlib.crc32(gram.encode("utf-8", "replace")) % BITS for gram in grams]
