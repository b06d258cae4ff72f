"""Find it in the text: a fact, a cell of a table, a sum over matching lines. The dial is length.

The last difficulties are the world's long prompts (hundreds of characters to over a thousand), and
rare: a prefill that costs something is needed now and then, not all the time.
"""

from __future__ import annotations

from random import Random
from string import ascii_lowercase

from pliant.nano.question import Draft, Family

_NAMES = tuple(a + b for a in ascii_lowercase for b in ascii_lowercase)


def find(rng: Random, difficulty: int) -> Draft:
    low, high = ((2, 2), (3, 4), (5, 8), (20, 40), (110, 150))[difficulty - 1]
    names = rng.sample(_NAMES, rng.randint(low, high))
    values = [str(rng.randint(1, 99)) for _ in names]
    told = ", ".join(f"{name} {value}" for name, value in zip(names, values, strict=True))
    asked = rng.randrange(len(names))
    return _asked(told, names[asked], values[asked])


def total(rng: Random, difficulty: int) -> Draft:
    """A table with a column of names and one of numbers; some names stand in it twice or more."""
    times, others = ((2, (0, 1)), (2, (2, 3)), (3, (2, 4)), (3, (15, 30)), (4, (90, 140)))[
        difficulty - 1
    ]
    asked, *names = rng.sample(_NAMES, 1 + rng.randint(*others))
    rows = [(asked, rng.randint(1, 9 if difficulty < 3 else 20)) for _ in range(times)]
    values = [value for _, value in rows]
    rows += [(name, rng.randint(1, 20)) for name in names]
    rng.shuffle(rows)
    told = ", ".join(f"{name} {value}" for name, value in rows)
    wordings = (f"{told}. sum {asked}", f"{told}; all {asked}", f"{told}. {asked} in all?")
    return Draft(str(sum(values)), wordings)


def cell(rng: Random, difficulty: int) -> Draft:
    n_rows, n_columns = ((2, 2), (2, 3), (3, 3), (5, 6), (16, 18))[difficulty - 1]
    rows, columns = rng.sample(_NAMES, n_rows), rng.sample(ascii_lowercase, n_columns)
    values = {(r, c): str(rng.randint(1, 99)) for r in rows for c in columns}
    told = "; ".join(f"{r} " + " ".join(f"{c}{values[r, c]}" for c in columns) for r in rows)
    row, column = rng.choice(rows), rng.choice(columns)
    return _asked(told, f"{row} {column}", values[row, column])


def _asked(told: str, what: str, answer: str) -> Draft:
    return Draft(answer, (f"{told}. {what}?", f"{told}; {what} has?", f"read {told}. {what}"))


_RARELY_LONG = (1.2, 1.0, 0.5, 0.1, 0.03)

FAMILIES = (
    Family("find", "reading", find, weight=0.8, mix=_RARELY_LONG),
    Family("total", "reading", total, weight=0.8, mix=_RARELY_LONG),
    Family("cell", "reading", cell, weight=0.8, mix=_RARELY_LONG),
)
