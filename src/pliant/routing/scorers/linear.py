"""How the linear fits behind scorers are chosen: folds, the best hyperparameter, joined tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from pliant.data import splits
from pliant.routing.outcomes import Outcomes
from pliant.routing.scorers.protocol import Partitions
from pliant.stats import Floats

Candidate = TypeVar("Candidate")


def folds(outcomes: Outcomes, number: int, seed: int) -> list[NDArray[np.int64]]:
    """The rows of each fold; prompts with the same text or question share a fold."""
    parts = splits(len(outcomes), [1 / number] * number, seed, outcomes.inseparable())
    return [np.asarray(part, dtype=np.int64) for part in parts if part]


def one_partition(outcomes: Outcomes, seed: int) -> Partitions:
    """Five folds, for a scorer that chooses its capacity by itself."""
    return [folds(outcomes, 5, seed)]


def gain_error(gain: Floats, outcomes: Outcomes) -> float:
    """The mean squared error of predicted gains, by which hyperparameters are chosen."""
    true = outcomes.right[:, 1:] - outcomes.right[:, :1]
    return float(np.mean((gain[:, 1:] - true) ** 2))


def best(
    candidates: Sequence[Candidate], error: Callable[[Candidate], float]
) -> tuple[Candidate, dict[str, float]]:
    """The candidate with the smallest error, and the error of each."""
    errors = [error(candidate) for candidate in candidates]
    table = {str(candidate): value for candidate, value in zip(candidates, errors, strict=True)}
    return candidates[int(np.argmin(errors))], table


def together(train: Outcomes, choice: Outcomes | None) -> Outcomes:
    """Both splits as one, for the last fit: once the choice is made, all rows can be used."""
    return train if choice is None else joined((train, choice))


def joined(parts: Sequence[Outcomes]) -> Outcomes:
    """The rows of several tables with the same models."""
    first = parts[0]
    assert all(part.models == first.models and part.unit == first.unit for part in parts)

    def texts(name: str) -> tuple[str, ...] | None:
        columns = [getattr(part, name) for part in parts]
        return None if any(c is None for c in columns) else tuple(t for c in columns for t in c)

    messages = tuple(m for part in parts for m in part.messages or (None,) * len(part))
    columns: Any = {name: texts(name) for name in ("prompts", "groups", "wordings", "questions")}
    return replace(
        first,
        right=np.concatenate([part.right for part in parts]),
        cost=np.concatenate([part.cost for part in parts]),
        messages=messages if any(messages) else None,
        **columns,
    )
