"""What the world is made of: a question with one right answer, and the families that pose them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

DIFFICULTIES = (1, 2, 3, 4, 5)
WORDINGS = (0, 1, 2)


@dataclass(frozen=True)
class Question:
    """One question: what is asked, what is right, and where on the map of the world it lies."""

    prompt: str
    answer: str
    family: str
    domain: str
    difficulty: int
    wording: int = 0
    """Which of its family's ways to ask: 0 is the canonical one."""

    def check(self, text: str) -> bool:
        """Whether `text` is the right answer, to the letter; white space around it is forgiven."""
        return text.strip() == self.answer


@dataclass(frozen=True)
class Draft:
    """What a family makes: an answer, and the ways to ask for it.

    The first wording is the canonical one: its hash decides the split, so that a question
    never stands in the training set in one wording and in the test set in another.
    """

    answer: str
    wordings: tuple[str, ...]


Make = Callable[[random.Random, int], Draft]


@dataclass(frozen=True)
class Family:
    """A kind of question: how one is made at each difficulty, and how often each is asked."""

    name: str
    domain: str
    make: Make
    weight: float = 1.0
    mix: tuple[float, float, float, float, float] = (1.4, 1.2, 1.0, 0.8, 0.6)
