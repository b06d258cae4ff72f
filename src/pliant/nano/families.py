"""Questions with one right answer, in families: how each is made at every difficulty.

What the seeds of a random generator give here is part of the data set: the embedded models' test
questions, and so their published accuracies, depend on every draw and on the order of the draws.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from string import ascii_lowercase

DIFFICULTIES = (1, 2, 3, 4, 5)
WORDINGS = (0, 1, 2)


@dataclass(frozen=True)
class Question:
    """A prompt, its right answer, and its family, domain and difficulty."""

    prompt: str
    answer: str
    family: str
    domain: str
    difficulty: int
    wording: int = 0
    """Which of the family's wordings the prompt is: 0 is the canonical one."""

    def check(self, text: str) -> bool:
        """Whether `text` is exactly the right answer; white space around it is ignored."""
        return text.strip() == self.answer


@dataclass(frozen=True)
class Draft:
    """What a family makes: an answer, and several wordings of the question.

    The hash of the first, canonical wording decides the split, so that a question is never in the
    training set in one wording and in the test set in another.
    """

    answer: str
    wordings: tuple[str, ...]


Make = Callable[[Random, int], Draft]


@dataclass(frozen=True)
class Family:
    """A kind of question: how to make one at each difficulty, and how often to draw each."""

    name: str
    domain: str
    make: Make
    weight: float = 1.0
    mix: tuple[float, float, float, float, float] = (1.4, 1.2, 1.0, 0.8, 0.6)


# --- arithmetic: numbers; the difficulty is the number of digits ----------------------------------


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
    ranges = ((10, 99, 3), (10, 99, 6), (10, 99, 9), (100, 999, 5), (100, 999, 9))
    low, high, most = ranges[difficulty - 1]
    a, b = rng.randint(low, high), rng.randint(2, most)
    return Draft(str(a * b), (f"{a}*{b}", f"{a} times {b}", f"{b} times {a} is?"))


def remainder(rng: Random, difficulty: int) -> Draft:
    kinds = ((3, (2, 5, 10)), (3, (4, 20, 25)), (2, (3, 9)), (3, (3, 9)), (3, (6, 7, 8)))
    size, moduli = kinds[difficulty - 1]
    a, m = digits(rng, size), rng.choice(moduli)
    return Draft(str(a % m), (f"{a} mod {m}", f"rest of {a} by {m}", f"what is {a} mod {m}?"))


# --- words: reverse a word, sort it, count in it; the difficulty is the word's length -------------


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


# --- logic: boolean expressions, chains of comparisons, the largest of some numbers ---------------


def boolean(rng: Random, difficulty: int) -> Draft:
    names = rng.sample(ascii_lowercase, 2 + difficulty // 3)
    values = {name: rng.random() < 0.5 for name in names}
    terms = rng.choices(names, k=2 + difficulty // 2)
    spoken, value = _term(rng, terms[0], values)
    for name in terms[1:]:  # read from left to right: no precedence to know about
        operator = rng.choice(("and", "or"))
        text, operand = _term(rng, name, values)
        spoken = f"{spoken} {operator} {text}"
        value = (value and operand) if operator == "and" else (value or operand)
    facts = " ".join(f"{name}{'+' if on else '-'}" for name, on in values.items())
    answer = "yes" if value else "no"
    return Draft(answer, (f"{facts}: {spoken}", f"{facts}, {spoken}?", f"if {facts} {spoken}"))


def _term(rng: Random, name: str, values: dict[str, bool]) -> tuple[str, bool]:
    if rng.random() < 0.3:
        return f"not {name}", not values[name]
    return name, values[name]


def order(rng: Random, difficulty: int) -> Draft:
    chain = rng.sample(ascii_lowercase, 2 + difficulty)
    facts = [f"{a}>{b}" for a, b in zip(chain, chain[1:], strict=False)]
    rng.shuffle(facts)
    facts_text = " ".join(facts)
    end, answer = rng.choice((("top", chain[0]), ("low", chain[-1]), ("2nd", chain[1])))
    return Draft(answer, (f"{facts_text} {end}", f"{end} of {facts_text}", f"{facts_text}, {end}?"))


def largest(rng: Random, difficulty: int) -> Draft:
    numbers, listed = _several(rng, difficulty)
    return Draft(str(max(numbers)), (f"max {listed}", f"largest of {listed}", f"{listed} most?"))


def _several(rng: Random, difficulty: int) -> tuple[list[int], str]:
    n, size = ((2, 2), (3, 2), (4, 2), (4, 3), (6, 4))[difficulty - 1]
    numbers = [digits(rng, size) for _ in range(n)]
    return numbers, " ".join(map(str, numbers))


# --- sequences: equal steps, sums of the two before, repeating patterns ---------------------------


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
    listed = " ".join(map(str, shown))
    return Draft(str(following), (f"{listed} ?", f"next: {listed}", f"{listed}, go on"))


def pattern(rng: Random, difficulty: int) -> Draft:
    period, number = ((2, 1), (3, 2), (4, 3), (5, 5), (7, 8))[difficulty - 1]
    unit = word(rng, period, period)
    length = period + rng.randint(1, period)
    row = unit * 5
    shown, following = row[:length], row[length : length + number]
    return Draft(
        following, (f"{shown} {number} more", f"{number} after {shown}", f"{shown} and {number} on")
    )


# --- reading: a fact, a cell of a table, a sum over lines; the difficulty is the length -----------
# The last difficulties are long prompts (hundreds of characters to over a thousand) and rare: an
# expensive prefill is needed now and then, not all the time.


_NAMES = tuple(a + b for a in ascii_lowercase for b in ascii_lowercase)


def find(rng: Random, difficulty: int) -> Draft:
    low, high = ((2, 2), (3, 4), (5, 8), (20, 40), (110, 150))[difficulty - 1]
    names = rng.sample(_NAMES, rng.randint(low, high))
    values = [str(rng.randint(1, 99)) for _ in names]
    table = ", ".join(f"{name} {value}" for name, value in zip(names, values, strict=True))
    position = rng.randrange(len(names))
    return _lookup(table, names[position], values[position])


def total(rng: Random, difficulty: int) -> Draft:
    """A table with a column of names and one of numbers; some names stand in it twice or more."""
    counts = ((2, (0, 1)), (2, (2, 3)), (3, (2, 4)), (3, (15, 30)), (4, (90, 140)))
    times, more = counts[difficulty - 1]
    name, *names = rng.sample(_NAMES, 1 + rng.randint(*more))
    rows = [(name, rng.randint(1, 9 if difficulty < 3 else 20)) for _ in range(times)]
    values = [value for _, value in rows]
    rows += [(other, rng.randint(1, 20)) for other in names]
    rng.shuffle(rows)
    table = ", ".join(f"{key} {number}" for key, number in rows)
    wordings = (f"{table}. sum {name}", f"{table}; all {name}", f"{table}. {name} in all?")
    return Draft(str(sum(values)), wordings)


def cell(rng: Random, difficulty: int) -> Draft:
    n_rows, n_columns = ((2, 2), (2, 3), (3, 3), (5, 6), (16, 18))[difficulty - 1]
    rows, columns = rng.sample(_NAMES, n_rows), rng.sample(ascii_lowercase, n_columns)
    values = {(r, c): str(rng.randint(1, 99)) for r in rows for c in columns}
    table = "; ".join(f"{r} " + " ".join(f"{c}{values[r, c]}" for c in columns) for r in rows)
    row, column = rng.choice(rows), rng.choice(columns)
    return _lookup(table, f"{row} {column}", values[row, column])


def _lookup(text: str, key: str, answer: str) -> Draft:
    return Draft(answer, (f"{text}. {key}?", f"{text}; {key} has?", f"read {text}. {key}"))


_RARELY_LONG = (1.2, 1.0, 0.5, 0.1, 0.03)


# --- unseen: held out of training -----------------------------------------------------------------
# Each is close to a family that was trained (the smallest to the largest, doubling to adding,
# shifting to spelling), and still the models solve next to none: their cards have the figures.


def smallest(rng: Random, difficulty: int) -> Draft:
    numbers, listed = _several(rng, difficulty)
    return Draft(str(min(numbers)), (f"min {listed}", f"smallest of {listed}", f"{listed} least?"))


def double(rng: Random, difficulty: int) -> Draft:
    low, high = ((10, 199), (200, 499), (500, 999), (1000, 4999), (5000, 9999))[difficulty - 1]
    a = rng.randint(low, high)
    return Draft(str(2 * a), (f"double {a}", f"twice {a}", f"what is {a} and {a}?"))


def shift(rng: Random, difficulty: int) -> Draft:
    w = word(rng, *((2, 2), (3, 4), (5, 6), (7, 9), (10, 13))[difficulty - 1], ascii_lowercase[:-1])
    moved = "".join(chr(ord(c) + 1) for c in w)
    return Draft(moved, (f"shift {w}", f"{w} one letter on", f"next letter of each of {w}"))


TRAINED: tuple[Family, ...] = (
    Family("add", "arithmetic", add),
    Family("subtract", "arithmetic", subtract),
    Family("multiply", "arithmetic", multiply),
    Family("remainder", "arithmetic", remainder),
    Family("reverse", "words", reverse),
    Family("sort", "words", sort),
    Family("count", "words", count),
    Family("boolean", "logic", boolean),
    Family("order", "logic", order),
    Family("largest", "logic", largest),
    # Patterns are soon learned to the last letter: drawn rarely, they leave something to learn.
    Family("step", "sequences", step, weight=1.5),
    Family("fibonacci", "sequences", fibonacci, weight=0.5),
    Family("pattern", "sequences", pattern, weight=0.25),
    Family("find", "reading", find, weight=0.8, mix=_RARELY_LONG),
    Family("total", "reading", total, weight=0.8, mix=_RARELY_LONG),
    Family("cell", "reading", cell, weight=0.8, mix=_RARELY_LONG),
)
HELD_OUT: tuple[Family, ...] = (
    Family("smallest", "unseen", smallest),
    Family("double", "unseen", double),
    Family("shift", "unseen", shift),
)
BY_NAME: dict[str, Family] = {family.name: family for family in TRAINED + HELD_OUT}
