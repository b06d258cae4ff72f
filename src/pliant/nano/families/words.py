"""Letters: turn a word round, sort it, count in it. The dial is the word's length."""

from __future__ import annotations

from random import Random
from string import ascii_lowercase

from pliant.nano.question import Draft, Family


def word(rng: Random, shortest: int, longest: int, alphabet: str = ascii_lowercase) -> str:
    return "".join(rng.choices(alphabet, k=rng.randint(shortest, longest)))


def reverse(rng: Random, difficulty: int) -> Draft:
    w = word(rng, *((3, 4), (5, 6), (7, 9), (10, 14), (15, 22))[difficulty - 1])
    return Draft(w[::-1], (f"reverse {w}", f"{w} backwards", f"turn {w} round"))


def sort(rng: Random, difficulty: int) -> Draft:
    w = word(rng, *((3, 4), (5, 6), (7, 9), (10, 13), (14, 19))[difficulty - 1])
    return Draft("".join(sorted(w)), (f"sort {w}", f"{w} in order", f"{w} from a to z"))


def count(rng: Random, difficulty: int) -> Draft:
    letters = rng.sample(ascii_lowercase, 3)
    w = word(rng, *((3, 4), (5, 6), (7, 9), (10, 13), (14, 18))[difficulty - 1], "".join(letters))
    c = rng.choice(letters)
    return Draft(str(w.count(c)), (f"count {c} in {w}", f"how many {c} in {w}", f"{c} in {w}?"))


FAMILIES = (
    Family("reverse", "words", reverse),
    Family("sort", "words", sort),
    Family("count", "words", count),
)
