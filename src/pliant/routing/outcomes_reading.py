"""Reading a label table: rows of a file, with grades and costs by model, in one of several shapes.

A model that a row does not name, or names with null, was not asked that prompt: its grade is NaN.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pliant.data import Row, read_prompts
from pliant.errors import InvalidInput, did_you_mean
from pliant.routing.prompts import Message, text_of
from pliant.routing.prompts import messages as messages_of
from pliant.stats import Floats

_CORRECT = ("correct", "right", "is_correct")
"""Keys of a grade, where a table holds objects."""


def read_table(
    path: str | Path,
    models: Sequence[str] | None,
    prompts: tuple[str, str | None],
    columns: Mapping[str, str],
    right: str,
    cost: str | Mapping[str, float],
    limit: int | None,
) -> dict[str, Any]:
    """The fields of `Outcomes`, whose `read` says what the arguments are; `prompts` are the columns
    of prompts and of conversations, `columns` those of the group, the wording and the question."""
    prompt, messages = prompts
    rows = read_prompts(path, [prompt], messages=messages, limit=limit)
    nested = any(right in row for row in rows)
    if nested:
        for i, row in enumerate(rows):
            if not isinstance(row.get(right), Mapping):
                raise InvalidInput(f"{path}, row {i + 1}: no numbers by model under {right!r}")
    present = _keys(row[right] if nested else row for row in rows)
    graded = [name for name in present if nested or any(_is_graded(row.get(name)) for row in rows)]
    if models is None and not graded:
        raise InvalidInput(
            f"{path}: no column {right!r}; say which columns are the models, the cheapest "
            "first (models=, --model), or which column holds them (right=, --right-column); "
            f"there are {', '.join(present)}"
        )
    named = tuple(models or graded)
    refuse_unknown(path, named, present)
    grades = _table(path, rows, named, right if nested else None)
    _refuse_unasked(path, named, grades)
    unlabelled = np.flatnonzero(np.isnan(grades).all(axis=1))
    if models is None and len(unlabelled):
        raise InvalidInput(f"{path}, row {unlabelled[0] + 1}: holds no grade of any model")
    costs, unit = _costs(path, rows, named, cost, right if nested else None, grades)
    texts, conversations = _prompts(path, rows, prompt)
    return {
        "prompts": texts,
        "models": named,
        "right": grades,
        "cost": costs,
        "unit": unit,
        "messages": conversations,
        **{f"{name}s": _texts(path, rows, column) for name, column in columns.items()},
    }


def _keys(mappings: Iterable[Mapping[str, Any]]) -> list[str]:
    """Of all rows, in the order in which they appear: the first row need not name every model."""
    return list(dict.fromkeys(key for mapping in mappings for key in mapping))


def _refuse_unasked(path: str | Path, models: Sequence[str], grades: Floats) -> None:
    for j, name in enumerate(models):
        if np.isnan(grades[:, j]).all():
            raise InvalidInput(
                f"{path}: {name} was never asked: no row holds a grade of it. Label prompts with "
                "it, or leave it out (models=, --model name the others)"
            )


def refuse_unknown(where: object, models: Sequence[str], known: Sequence[str]) -> None:
    for name in models:
        if name not in known:
            raise InvalidInput(f"{where}: no model {name!r}{did_you_mean(name, known)}")


def _prompts(
    path: str | Path, rows: Sequence[Row], column: str
) -> tuple[tuple[str, ...], tuple[Sequence[Message] | None, ...] | None]:
    """The texts, and the conversations of the prompt's column or, as in labels, of `messages`."""
    texts: list[str] = []
    conversations: list[Sequence[Message] | None] = []
    for i, row in enumerate(rows):
        prompt = row[column]
        if isinstance(prompt, (bool, int, float)):  # a table whose reader took a text for a number
            prompt = str(prompt)
        try:
            texts.append(text_of(prompt))
        except InvalidInput as error:
            raise InvalidInput(f"{path}, row {i + 1}: {error}") from None
        is_text = isinstance(prompt, str)
        conversations.append(_conversation(row, prompt) if is_text else messages_of(prompt))
    return tuple(texts), tuple(conversations) if any(conversations) else None


def _conversation(row: Row, text: str) -> Sequence[Message] | None:
    try:
        conversation = messages_of(row["messages"])
    except (InvalidInput, KeyError):  # missing, or another column of that name
        return None
    return conversation if text_of(conversation) == text else None


def _is_graded(value: Any) -> bool:
    """Whether it is an object such as {"correct": true}."""
    return isinstance(value, Mapping) and any(key in value for key in _CORRECT)


def _table(
    path: str | Path,
    rows: Sequence[Row],
    models: Sequence[str],
    column: str | None,
    keys: Sequence[str] = _CORRECT,
) -> Floats:
    """(n, m): a nested column's values by model, or one column a model; of objects, the number
    under the first of these keys. NaN where there is none."""
    table = np.full((len(rows), len(models)), np.nan)
    for i, row in enumerate(rows):
        values = row if column is None else row.get(column)
        for j, name in enumerate(models):
            try:
                value = None if values is None else values.get(name)
                if isinstance(value, Mapping):
                    value = next(value[key] for key in keys if key in value)
                if value is not None and value != "":  # CSV has no null
                    table[i, j] = _number(value)
            except (AttributeError, TypeError, ValueError, OverflowError, StopIteration) as error:
                raise _no_number(path, i, name, column) from error
    return table


def _no_number(path: str | Path, row: int, model: str, column: str | None) -> InvalidInput:
    label = model if column is None else f"{column}.{model}"
    return InvalidInput(f"{path}, row {row + 1}: no number under {label!r}")


def _number(value: Any) -> float:
    """True, false and numbers, also as text from CSV."""
    if isinstance(value, str):
        text = value.strip().lower()
        return float({"true": "1", "false": "0"}.get(text, text))
    return float(value)


def _costs(
    path: str | Path,
    rows: Sequence[Row],
    models: Sequence[str],
    cost: str | Mapping[str, float],
    right: str | None,
    grades: Floats,
) -> tuple[Floats, str]:
    """(n, m), and the unit that the rows state; every graded answer needs a cost."""
    unit = str(rows[0].get("unit") or "calls")
    if any(str(row.get("unit") or "calls") != unit for row in rows):
        raise InvalidInput(f"{path}: its rows state costs in several units")
    if isinstance(cost, Mapping):
        refuse_unknown("cost", models, list(cost))
        return np.tile([float(cost[name]) for name in models], (len(rows), 1)), unit
    if any(cost in row for row in rows):
        column: str | None = cost
        costs = _table(path, rows, models, column)
    elif _have_costs(rows, models, cost, right):
        column = right
        costs = _table(path, rows, models, column, [cost])
    elif len(models) > 2:
        raise InvalidInput(
            f"{path}: no column {cost!r}; more than two models need costs (--cost-column)"
        )
    else:
        return np.tile([0.0, 1.0], (len(rows), 1)), "calls"
    without = np.argwhere(np.isnan(costs) & ~np.isnan(grades))
    if len(without):
        i, j = without[0].tolist()
        raise _no_number(path, i, models[j], column)
    return costs, unit


def _have_costs(rows: Sequence[Row], models: Sequence[str], cost: str, right: str | None) -> bool:
    """Whether the grades are objects that hold costs, too."""
    graded = [row if right is None else row[right] for row in rows]
    grades = [each[name] for each in graded for name in models if each.get(name) is not None]
    return all(isinstance(grade, Mapping) and cost in grade for grade in grades)


def _texts(path: str | Path, rows: Sequence[Row], column: str) -> tuple[str, ...] | None:
    """A column that all rows have, or none."""
    values = [row.get(column) for row in rows]
    if all(value is None for value in values):
        if column not in ("group", "wording", "question"):  # the caller named it
            raise InvalidInput(f"{path}: no column {column!r}{did_you_mean(column, _keys(rows))}")
        return None
    if any(value is None for value in values):
        raise InvalidInput(
            f"{path}, row {values.index(None) + 1}: no {column!r}, but others have one"
        )
    return tuple(map(str, values))
