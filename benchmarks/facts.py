"""Questions about one of three people in a short text, in five families, each with one answer."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from pliant.data import Row

NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Iris", "Jack")
ITEMS = ("cup", "hat", "bag", "book", "coat", "scarf", "kite", "bike", "pen", "ball", "lamp")
COLOURS = ("red", "blue", "green", "yellow", "black", "white", "brown", "pink", "grey", "purple")
CITIES = ("Paris", "London", "Rome", "Berlin", "Madrid", "Vienna", "Oslo", "Dublin", "Athens")
JOBS = ("teacher", "doctor", "farmer", "baker", "pilot", "nurse", "lawyer", "painter", "singer")
PEOPLE = 3


def question(family: str, draw: random.Random) -> Row:
    """Three sentences and a question about one of them; `wrong` has the two other facts."""
    people, item = draw.sample(NAMES, PEOPLE), draw.choice(ITEMS)
    colours, cities = draw.sample(COLOURS, PEOPLE), draw.sample(CITIES, PEOPLE)
    jobs, ages = draw.sample(JOBS, PEOPLE), list(map(str, draw.sample(range(11, 80), PEOPLE)))
    asked = draw.randrange(PEOPLE)
    person, colour = people[asked], colours[asked]
    has = [f"{p} has a {c} {item}." for p, c in zip(people, colours, strict=True)]
    lives = [
        f"{p} is a {j} and lives in {c}." for p, j, c in zip(people, jobs, cities, strict=True)
    ]
    counts = [f"{p} is {a} years old." for p, a in zip(people, ages, strict=True)]
    texts, ending, facts = {
        "colour": (has, f"What colour is {person}'s {item}? Answer with one word.", colours),
        "owner": (has, f"Who has the {colour} {item}? Answer with one word.", people),
        "city": (lives, f"Where does {person} live? Answer with one word.", cities),
        "job": (lives, f"What is the job of {person}? Answer with one word.", jobs),
        "age": (counts, f"How old is {person}? Answer with the number only.", ages),
    }[family]
    wrong = [fact for fact in facts if fact != facts[asked]]
    return Row(prompt=f"{' '.join(texts)} {ending}", answer=facts[asked], wrong=wrong)


def questions(family: str, count: int, split: str, avoid: Sequence[Row] = ()) -> list[Row]:
    draw = random.Random(f"{family} {split}")
    known, rows = {row["prompt"] for row in avoid}, dict[str, Row]()
    while len(rows) < count:
        row = question(family, draw)
        if row["prompt"] not in known:
            rows[row["prompt"]] = row
    return list(rows.values())


def is_right(answer: str, right: str, wrong: Sequence[str]) -> float:
    return float(right in answer and not any(fact in answer for fact in wrong))


def reward(completions: Any, answer: Any, wrong: Any, **_: Any) -> list[float]:
    return [is_right(*row) for row in zip(completions, answer, wrong, strict=True)]
