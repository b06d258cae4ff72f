"""Truth and order: boolean expressions, chains of comparisons, the largest of some numbers."""

from __future__ import annotations

from random import Random
from string import ascii_lowercase

from pliant.nano.families.arithmetic import digits
from pliant.nano.question import Draft, Family


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
    given = " ".join(f"{name}{'+' if on else '-'}" for name, on in values.items())
    answer = "yes" if value else "no"
    return Draft(answer, (f"{given}: {spoken}", f"{given}, {spoken}?", f"if {given} {spoken}"))


def _term(rng: Random, name: str, values: dict[str, bool]) -> tuple[str, bool]:
    if rng.random() < 0.3:
        return f"not {name}", not values[name]
    return name, values[name]


def order(rng: Random, difficulty: int) -> Draft:
    chain = rng.sample(ascii_lowercase, 2 + difficulty)
    facts = [f"{a}>{b}" for a, b in zip(chain, chain[1:], strict=False)]
    rng.shuffle(facts)
    told = " ".join(facts)
    end, answer = rng.choice((("top", chain[0]), ("low", chain[-1]), ("2nd", chain[1])))
    return Draft(answer, (f"{told} {end}", f"{end} of {told}", f"{told}, {end}?"))


def largest(rng: Random, difficulty: int) -> Draft:
    n, size = ((2, 2), (3, 2), (4, 2), (4, 3), (6, 4))[difficulty - 1]
    numbers = [digits(rng, size) for _ in range(n)]
    told = " ".join(map(str, numbers))
    answer = str(max(numbers))
    return Draft(answer, (f"max {told}", f"largest of {told}", f"{told} most?"))


FAMILIES = (
    Family("boolean", "logic", boolean),
    Family("order", "logic", order),
    Family("largest", "logic", largest),
)
