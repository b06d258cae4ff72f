"""An endless supply of questions with verifiable answers, in disjoint splits."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from itertools import islice
from math import exp
from typing import Any

from pliant.errors import InvalidInput
from pliant.nano.families import BY_NAME, DIFFICULTIES, TRAINED, WORDINGS, Family, Question

# Shares of a hash's first byte. Use dev for choices made while building (the mix, the recipe), and
# test only once everything is chosen.
_SPLITS = {"train": range(0, 208), "dev": range(208, 224), "test": range(224, 256)}
_DRAWS_BEFORE_A_REPEAT = 200


def questions(
    split: str,
    n: int,
    seed: int = 0,
    families: Sequence[str] | None = None,
    wordings: Sequence[int] | None = None,
) -> list[Question]:
    """`n` questions of a split ("train", "dev", "test"), the same for the same seed.

    `families` defaults to those that the embedded models were trained on; name others ("shift") to
    get them: `HELD_OUT` lists the ones that no model has seen. `wordings` selects from each
    family's three: 0 is the canonical one. No prompt is repeated, unless hundreds of draws in a row
    bring nothing new; so among very many questions, small families (the easiest sums) are rarer
    than their weight.
    """
    if n < 0:
        raise InvalidInput(f"n is {n}; the number of questions is 0 or more")
    if wordings is not None and not (wordings and set(wordings) <= set(WORDINGS)):
        raise InvalidInput(f"wordings is {wordings!r}; name some of {WORDINGS}")
    drawn = (
        question
        for question in stream(split, seed, families)
        if wordings is None or question.wording in wordings
    )
    return list(islice(_distinct(drawn), n))


def conversations(
    split: str, n: int, seed: int = 0, families: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """The same questions as conversations to train on: the user asks, the assistant answers."""
    return [
        {
            "messages": [
                {"role": "user", "content": question.prompt},
                {"role": "assistant", "content": question.answer},
            ]
        }
        for question in questions(split, n, seed, families)
    ]


def stream(
    split: str,
    seed: int = 0,
    families: Sequence[str] | None = None,
    tilt: float = 0.0,
    emphasis: Mapping[str, float] | None = None,
) -> Iterator[Question]:
    """An endless stream of a split's questions, drawn by each family's weight and difficulty mix.

    `tilt` favours easy questions: each step of difficulty is e^tilt times rarer. `emphasis`
    multiplies the weights of the families that it names.
    """
    rng = random.Random(f"{split}/{seed}")
    selected = [_named(name) for name in families] if families is not None else list(TRAINED)
    if not selected:
        raise InvalidInput("families is empty; name at least one, or leave it out")
    hashes = _hashes(split)
    weights = [family.weight * (emphasis or {}).get(family.name, 1.0) for family in selected]
    mixes = {f.name: [m * exp(-tilt * i) for i, m in enumerate(f.mix)] for f in selected}
    while True:
        family = rng.choices(selected, weights)[0]
        difficulty = rng.choices(DIFFICULTIES, mixes[family.name])[0]
        yield _draw(family, difficulty, hashes, rng)


def _draw(family: Family, difficulty: int, hashes: range, rng: random.Random) -> Question:
    while True:
        draft = family.make(rng, difficulty)
        key = f"{family.name}/{draft.wordings[0]}"
        if sha256(key.encode()).digest()[0] in hashes:
            prompt = rng.choice(draft.wordings)
            wording = draft.wordings.index(prompt)
            return Question(prompt, draft.answer, family.name, family.domain, difficulty, wording)


def _distinct(drawn: Iterator[Question]) -> Iterator[Question]:
    seen: set[str] = set()
    misses = 0
    for question in drawn:
        if question.prompt in seen and misses < _DRAWS_BEFORE_A_REPEAT:
            misses += 1
            continue
        misses = 0
        seen.add(question.prompt)
        yield question


def _hashes(split: str) -> range:
    if split not in _SPLITS:
        raise InvalidInput(f"split is {split!r}; there are {', '.join(_SPLITS)}")
    return _SPLITS[split]


def _named(name: str) -> Family:
    if name not in BY_NAME:
        raise InvalidInput(f"no family is called {name!r}; there are {', '.join(BY_NAME)}")
    return BY_NAME[name]
