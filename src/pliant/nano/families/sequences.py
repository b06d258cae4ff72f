"""What comes next: equal steps, repeating patterns, sums of the two before."""

from __future__ import annotations

from random import Random

from pliant.nano.families.words import word
from pliant.nano.question import Draft, Family


def step(rng: Random, difficulty: int) -> Draft:
    first, most = ((99, 3), (99, 9), (300, 12), (600, 30), (900, 99))[difficulty - 1]
    a, d = rng.randint(1, first), rng.randint(1, most)
    shown = [a + i * d for i in range(5 if difficulty < 3 else 4)]
    if difficulty > 1 and rng.random() < 0.4:
        shown.reverse()
    following = 2 * shown[-1] - shown[-2]
    if following < 0:
        shown.reverse()
        following = 2 * shown[-1] - shown[-2]
    return _next(shown[-4:], following)


def fibonacci(rng: Random, difficulty: int) -> Draft:
    low, high = ((10, 30), (20, 60), (30, 99), (60, 300), (200, 900))[difficulty - 1]
    shown = [rng.randint(low, high), rng.randint(low, high)]
    while len(shown) < 4:
        shown.append(shown[-1] + shown[-2])
    return _next(shown, shown[-1] + shown[-2])


def _next(shown: list[int], following: int) -> Draft:
    told = " ".join(map(str, shown))
    return Draft(str(following), (f"{told} ?", f"next: {told}", f"{told}, go on"))


def pattern(rng: Random, difficulty: int) -> Draft:
    period, asked = ((2, 1), (3, 2), (4, 3), (5, 5), (7, 8))[difficulty - 1]
    unit = word(rng, period, period)
    cut = period + rng.randint(1, period)
    row = unit * 5
    told, following = row[:cut], row[cut : cut + asked]
    return Draft(
        following, (f"{told} {asked} more", f"{asked} after {told}", f"{told} and {asked} on")
    )


# Patterns are soon learned to the last letter: asked rarely, they leave something to learn.
FAMILIES = (
    Family("step", "sequences", step, weight=1.5),
    Family("fibonacci", "sequences", fibonacci, weight=0.5),
    Family("pattern", "sequences", pattern, weight=0.25),
)
