"""Numbers: sums, differences, products and remainders. The dial is the number of digits."""

from __future__ import annotations

from random import Random

from pliant.nano.question import Draft, Family


def digits(rng: Random, n: int) -> int:
    """A number of exactly n digits (for one digit, none is zero: there is something to do)."""
    return rng.randint(10 ** (n - 1), 10**n - 1)


def add(rng: Random, difficulty: int) -> Draft:
    long, short = ((2, 1), (2, 2), (3, 1), (3, 2), (3, 3))[difficulty - 1]
    a, b = digits(rng, long), digits(rng, short)
    if rng.random() < 0.5:
        a, b = b, a
    return Draft(str(a + b), (f"{a}+{b}", f"add {a} and {b}", f"what is {a}+{b}?"))


def subtract(rng: Random, difficulty: int) -> Draft:
    long, short = ((2, 1), (2, 2), (3, 1), (3, 2), (3, 3))[difficulty - 1]
    b, a = sorted((digits(rng, long), digits(rng, short)))
    return Draft(str(a - b), (f"{a}-{b}", f"take {b} from {a}", f"what is {a}-{b}?"))


def multiply(rng: Random, difficulty: int) -> Draft:
    low, high, most = ((10, 99, 3), (10, 99, 6), (10, 99, 9), (100, 999, 5), (100, 999, 9))[
        difficulty - 1
    ]
    a, b = rng.randint(low, high), rng.randint(2, most)
    return Draft(str(a * b), (f"{a}*{b}", f"{a} times {b}", f"{b} times {a} is?"))


def remainder(rng: Random, difficulty: int) -> Draft:
    size, moduli = ((3, (2, 5, 10)), (3, (4, 20, 25)), (2, (3, 9)), (3, (3, 9)), (3, (6, 7, 8)))[
        difficulty - 1
    ]
    a, m = digits(rng, size), rng.choice(moduli)
    return Draft(str(a % m), (f"{a} mod {m}", f"rest of {a} by {m}", f"what is {a} mod {m}?"))


FAMILIES = (
    Family("add", "arithmetic", add),
    Family("subtract", "arithmetic", subtract),
    Family("multiply", "arithmetic", multiply),
    Family("remainder", "arithmetic", remainder),
)
