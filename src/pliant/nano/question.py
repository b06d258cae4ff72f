"""The types of the question world: a question with one right answer, and families of questions."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

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


Make = Callable[[random.Random, int], Draft]


@dataclass(frozen=True)
class Family:
    """A kind of question: how to make one at each difficulty, and how often to draw each."""

    name: str
    domain: str
    make: Make
    weight: float = 1.0
    mix: tuple[float, float, float, float, float] = (1.4, 1.2, 1.0, 0.8, 0.6)
