"""Split rows at random, and find the texts that two splits share."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from pliant.errors import InvalidInput


@dataclass(frozen=True)
class Duplicates:
    """Rows of the test set whose text, once `normalised`, is also in the training set."""

    pairs: tuple[tuple[int, int], ...]
    """(row of train, row of test); for each test row its first match."""
    of: int
    """How many rows the test set has."""

    @property
    def test_rows(self) -> tuple[int, ...]:
        return tuple(test for _, test in self.pairs)

    def __bool__(self) -> bool:
        return bool(self.pairs)

    def __str__(self) -> str:
        if not self.pairs:
            return f"none of the {self.of:,} test rows is in the training set"
        share = len(self.pairs) / self.of
        first = ", ".join(f"{test + 1} (= {train + 1})" for train, test in self.pairs[:3])
        more = ", ..." if len(self.pairs) > 3 else ""
        return (
            f"{len(self.pairs):,} of the {self.of:,} test rows ({share:.1%}) are in the training "
            f"set too: rows {first}{more}"
        )


def duplicates(train: Sequence[str], test: Sequence[str]) -> Duplicates:
    """The texts of `test` that are also in `train`, up to case, white space and Unicode forms."""
    first: dict[str, int] = {}
    for i, text in enumerate(train):
        first.setdefault(normalised(text), i)
    matches = ((first.get(normalised(text)), j) for j, text in enumerate(test))
    return Duplicates(tuple((i, j) for i, j in matches if i is not None), len(test))


def normalised(text: str) -> str:
    """The text in Unicode's NFKC form, case folded, each run of white space one space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def splits(
    n: int, shares: Sequence[float], seed: int, keys: Sequence[Hashable] | None = None
) -> list[list[int]]:
    """The rows 0..n-1 in random splits of these shares, each split sorted.

    Rows with the same key stay together; the sizes are then as near to the shares as the keys
    allow. Shares that sum to less than 1 leave rows out.
    """
    if not shares or min(shares) <= 0 or sum(shares) > 1 + 1e-9:
        raise InvalidInput(f"shares={tuple(shares)} must be positive and sum to at most 1")
    if keys is not None and len(keys) != n:
        raise InvalidInput(f"{len(keys)} keys for {n} rows")
    blocks: dict[Hashable, list[int]] = {}
    for i in range(n):
        blocks.setdefault(i if keys is None else keys[i], []).append(i)
    order = list(blocks.values())
    random.Random(seed).shuffle(order)
    wanted = [share * n for share in (*shares, max(0.0, 1 - sum(shares)))]
    parts: list[list[int]] = [[] for _ in wanted]
    for rows in order:
        side = max(range(len(wanted)), key=lambda s: wanted[s] - len(parts[s]))
        parts[side] += rows
    return [sorted(part) for part in parts[: len(shares)]]
