"""Families that no embedded model was trained on: the world's unknown country.

Each is close to something that was learned (the smallest to the largest, doubling to adding,
shifting to spelling), and yet the models carry next to nothing over by themselves: their cards have
the figures.
"""

from __future__ import annotations

from random import Random

from pliant.nano.families.arithmetic import digits
from pliant.nano.families.words import word
from pliant.nano.question import Draft, Family


def smallest(rng: Random, difficulty: int) -> Draft:
    n, size = ((2, 2), (3, 2), (4, 2), (4, 3), (6, 4))[difficulty - 1]
    numbers = [digits(rng, size) for _ in range(n)]
    told = " ".join(map(str, numbers))
    return Draft(str(min(numbers)), (f"min {told}", f"smallest of {told}", f"{told} least?"))


def double(rng: Random, difficulty: int) -> Draft:
    low, high = ((10, 199), (200, 499), (500, 999), (1000, 4999), (5000, 9999))[difficulty - 1]
    a = rng.randint(low, high)
    return Draft(str(2 * a), (f"double {a}", f"twice {a}", f"what is {a} and {a}?"))


def shift(rng: Random, difficulty: int) -> Draft:
    alphabet = "abcdefghijklmnopqrstuvwxyz"
    w = word(rng, *((2, 2), (3, 4), (5, 6), (7, 9), (10, 13))[difficulty - 1], alphabet[:-1])
    moved = "".join(alphabet[alphabet.index(c) + 1] for c in w)
    return Draft(moved, (f"shift {w}", f"{w} one letter on", f"next letter of each of {w}"))


FAMILIES = (
    Family("smallest", "unseen", smallest),
    Family("double", "unseen", double),
    Family("shift", "unseen", shift),
)
