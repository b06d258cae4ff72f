"""Shots: a few solved examples of a new task, never part of what it is tested on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pliant.data import splits
from pliant.errors import InvalidInput, check_whole
from pliant.experts.adapting.prompts import Prompt, key_of

RowType = TypeVar("RowType", bound=Mapping[str, Any])


@dataclass(frozen=True)
class Shot:
    """A prompt and its right answer."""

    prompt: Prompt
    answer: str


def shots_of(rows: Sequence[Mapping[str, Any]]) -> list[Shot]:
    """The shots in rows with a `prompt` and an `answer`; of several right answers, the first."""
    shots = []
    for i, row in enumerate(rows):
        for name in ("prompt", "answer"):
            if name not in row:
                raise InvalidInput(f"shot {i} has no {name!r}: give a prompt and its right answer")
        answer = row["answer"]
        if isinstance(answer, list | tuple) and answer:
            answer = answer[0]
        if answer is None or isinstance(answer, list | tuple | Mapping):
            raise InvalidInput(f"shot {i}: the answer {answer!r:.80} is neither text nor a number")
        if not str(answer).strip():
            raise InvalidInput(f"shot {i} has an empty answer: there is nothing to learn from it")
        shots.append(Shot(row["prompt"], str(answer)))
    return shots


def split_shots(
    rows: Sequence[RowType], shots: int = 10, seed: int = 0
) -> tuple[list[RowType], list[RowType]]:
    """So many rows as shots, drawn at random, and the others to test on.

    Rows with the same prompt are on the same side.
    """
    check_whole("shots", shots, 1)
    if shots >= len(rows):
        raise InvalidInput(f"{shots} shots of {len(rows)} rows leave none to test on")
    keys = [key_of(row["prompt"]) for row in rows]
    share = shots / len(rows)
    (mine,) = splits(len(rows), [share], seed, keys)
    chosen = set(mine)
    return [rows[i] for i in mine], [row for i, row in enumerate(rows) if i not in chosen]


def check_split(shots: Sequence[Shot], test: Sequence[Prompt]) -> None:
    """Refuse a test that holds a shot: its score would be too good."""
    places = {key_of(shot.prompt): i for i, shot in enumerate(shots)}
    both = [(places[key_of(p)], j) for j, p in enumerate(test) if key_of(p) in places]
    if both:
        shot, row = both[0]
        raise InvalidInput(
            f"{len(both)} of the {len(test)} test prompts are shots too (shot {shot + 1} is test "
            f"row {row + 1}): take the shots out of the test"
        )
