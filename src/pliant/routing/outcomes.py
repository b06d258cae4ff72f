"""The label table: which models were right on which prompts, and what each answer cost.

outcomes = Outcomes.read("labels.jsonl")                                   # `pliant route label`
outcomes = Outcomes.read("mmlu.jsonl.gz", models=("weak", "strong"))       # flat columns
train, test = outcomes.split((0.5, 0.5), seed=0)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pliant.data import Row, normalised, read_rows, splits, write_rows
from pliant.errors import InvalidInput, did_you_mean
from pliant.routing.prompts import Message, Prompt, text_of
from pliant.routing.prompts import messages as messages_of
from pliant.routing.units import UNITS
from pliant.stats import Floats

_CORRECT = ("correct", "right", "is_correct")
"""Keys of a grade, where a table holds objects."""
_COLUMNS = ("prompts", "groups", "wordings", "questions", "messages")


@dataclass(frozen=True, eq=False)
class Outcomes:
    """n prompts and m models: the cheapest first as they are read, the strongest last in a fit
    (`by_quality`)."""

    prompts: tuple[str, ...]
    models: tuple[str, ...]
    right: Floats
    """(n, m), each in [0, 1]: the share of a model's samples that were right."""
    cost: Floats
    """(n, m): what each answer cost, in `unit`."""
    groups: tuple[str, ...] | None = None
    """The subject, family or source of each prompt."""
    wordings: tuple[str, ...] | None = None
    """Which of several wordings each prompt is."""
    questions: tuple[str, ...] | None = None
    """The question of each prompt, where several word the same one: those stay in one split."""
    unit: str = "calls"
    messages: tuple[Sequence[Message] | None, ...] | None = None
    """The conversation of each prompt that is more than the text in `prompts`."""

    def __post_init__(self) -> None:
        for name in ("right", "cost"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=np.float64))
        for name in ("models", *_COLUMNS):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else tuple(value))
        self._refuse_wrong_sizes()
        if not ((self.right >= 0) & (self.right <= 1)).all():
            raise InvalidInput("`right` must lie in [0, 1] for every prompt and model")
        if not ((self.cost >= 0) & np.isfinite(self.cost)).all():
            raise InvalidInput("`cost` must be finite, 0 or more, for every prompt and model")
        if self.unit not in UNITS:
            raise InvalidInput(f"unit={self.unit!r}{did_you_mean(self.unit, UNITS)}")

    @property
    def asked(self) -> tuple[Prompt, ...]:
        """Each prompt as a model receives it: the conversation, if it is one."""
        conversations = self.messages or (None,) * len(self)
        pairs = zip(conversations, self.prompts, strict=True)
        return tuple(conversation or text for conversation, text in pairs)

    @property
    def gain(self) -> Floats:
        """(n,) how much more often the last model is right than the first, in [-1, 1]."""
        return self.right[:, -1] - self.right[:, 0]

    @property
    def weak(self) -> Floats:
        """(n,) of the first model."""
        return self.right[:, 0]

    @property
    def strong(self) -> Floats:
        """(n,) of the last model."""
        return self.right[:, -1]

    @property
    def best(self) -> int:
        """The index of the model that is right most often; of equals, the cheapest."""
        return int(np.lexsort((self.cost.mean(axis=0), -self.right.mean(axis=0)))[0])

    @property
    def strong_costs_no_more(self) -> bool:
        """Whether the last model is no more expensive than any other."""
        costs = self.cost.mean(axis=0)
        return bool(costs[-1] <= costs.min() * (1 + 1e-9))

    def routed(self, chosen: NDArray[np.int64]) -> tuple[Floats, Floats]:
        """(n,) and (n,): how often the chosen model of each prompt is right, and what it costs."""
        rows = np.arange(len(self))
        return self.right[rows, chosen], self.cost[rows, chosen]

    def shares(self, chosen: NDArray[np.int64]) -> Floats:
        """(m,) the share of prompts that each model answers."""
        return np.bincount(chosen, minlength=len(self.models)) / len(self)

    def __len__(self) -> int:
        return len(self.prompts)

    @classmethod
    def read(
        cls,
        path: str | Path,
        models: Sequence[str] | None = None,
        *,
        prompt: str = "prompt",
        group: str = "group",
        wording: str = "wording",
        question: str = "question",
        right: str = "right",
        cost: str | Mapping[str, float] = "cost",
        unit: str | None = None,
        limit: int | None = None,
    ) -> Outcomes:
        """Read a table: JSONL, CSV (also .gz), parquet or a data set.

        A row holds `right` (and `cost`) by model, as `pliant route label` writes it. Without such
        a column each of `models` is a column, with true and false or shares. Either may also hold
        objects, {"correct": true, "cost": 0.01}, which need no names. `models` are named the
        cheapest first; left out, they are ordered by their mean cost. `cost` may also be a price
        of a call for each model. Without any costs a call of the first of two models costs 0 and
        of the second 1, in "calls".
        """
        rows = read_rows(path, [prompt], limit=limit)
        nested = right in rows[0]
        if nested and not isinstance(rows[0][right], Mapping):
            raise InvalidInput(f"{path}, row 1: no numbers by model under {right!r}")
        columns = list(rows[0][right]) if nested else list(rows[0])
        graded = [name for name in columns if nested or _is_graded(rows[0][name])]
        if models is None and not graded:
            raise InvalidInput(
                f"{path}: no column {right!r}; say which columns are the models, the cheapest "
                "first (models=, --model), or which column holds them (right=, --right-column); "
                f"there are {', '.join(columns)}"
            )
        named = tuple(models or graded)
        _refuse_unknown(path, named, columns)
        table = _table(path, rows, named, right if nested else None)
        costs, stated_unit = _costs(path, rows, named, cost, right if nested else None)
        texts, conversations = _prompts(path, rows, prompt)
        result = cls(
            texts,
            named,
            table,
            costs,
            _texts(path, rows, group),
            _texts(path, rows, wording),
            _texts(path, rows, question),
            unit or stated_unit,
            conversations,
        )
        if models:
            return result
        return result.by_cost()

    def write(self, path: str | Path) -> None:
        """Write the table for `read`: one JSON object a prompt."""
        write_rows(path, (self._row(i) for i in range(len(self))))

    def select(self, rows: ArrayLike) -> Outcomes:
        """The prompts at these indices, in this order, or where a mask is true."""
        index = np.arange(len(self))[np.asarray(rows)]
        columns = {name: getattr(self, name) for name in _COLUMNS}
        selected: dict[str, Any] = {
            name: None if column is None else tuple(column[i] for i in index)
            for name, column in columns.items()
        }
        return replace(self, right=self.right[index], cost=self.cost[index], **selected)

    def of_models(self, models: Sequence[str]) -> Outcomes:
        """The same prompts with these models, in this order."""
        _refuse_unknown("these outcomes", models, self.models)
        at = [self.models.index(name) for name in models]
        return replace(self, models=tuple(models), right=self.right[:, at], cost=self.cost[:, at])

    def by_cost(self) -> Outcomes:
        """The cheapest model first; of equally expensive ones, the better one last."""
        order = np.lexsort((self.right.mean(axis=0), self.cost.mean(axis=0)))
        return self.of_models([self.models[j] for j in order])

    def by_quality(self) -> Outcomes:
        """The model that is right most often last, whatever it costs, and the one that is right
        least often first; of equals, the cheaper one counts as the stronger."""
        order = np.lexsort((-self.cost.mean(axis=0), self.right.mean(axis=0)))
        return self.of_models([self.models[j] for j in order])

    def split(
        self, shares: Sequence[float], seed: int, by: str | None = None
    ) -> tuple[Outcomes, ...]:
        """Random splits of these shares.

        Prompts of the same text (up to case and white space) or of the same question stay in one
        split; with `by="group"` or `by="wording"`, all prompts of a group or of a wording do.
        """
        keys: Sequence[str] | None
        if by is None:
            keys = self.inseparable()
        elif by in ("group", "wording"):
            keys = self.groups if by == "group" else self.wordings
            if keys is None:
                raise InvalidInput(f"by={by!r}: these outcomes have no {by}s")
        else:
            raise InvalidInput(f'by={by!r}: "group", "wording" or None')
        parts = splits(len(self), shares, seed, keys)
        if not all(parts):
            raise InvalidInput(
                f"{len(set(keys)):,} different {by or 'prompt'}s are too few: {len(parts)} splits"
            )
        return tuple(self.select(part) for part in parts)

    def inseparable(self) -> list[str]:
        """(n,) a key of each prompt, equal for prompts with the same text or question.

        Also over several steps: a text that two questions share joins them.
        """
        texts = [normalised(text) for text in self.prompts]
        if self.questions is None:
            return texts
        first: dict[str, int] = {}  # the first row of each text and of each question
        leader = list(range(len(texts)))

        def root(i: int) -> int:
            while leader[i] != i:
                leader[i] = i = leader[leader[i]]
            return i

        for i, (text, question) in enumerate(zip(texts, self.questions, strict=True)):
            for key in (f"text {text}", f"question {question}"):
                leader[root(i)] = root(first.setdefault(key, i))
        return [str(root(i)) for i in range(len(texts))]

    def _row(self, i: int) -> Row:
        optional = {
            "messages": self.messages,
            "group": self.groups,
            "wording": self.wordings,
            "question": self.questions,
        }
        present = {name: column[i] for name, column in optional.items() if column is not None}
        return {
            "prompt": self.prompts[i],
            **{name: value for name, value in present.items() if value is not None},
            "right": dict(zip(self.models, self.right[i].tolist(), strict=True)),
            "cost": dict(zip(self.models, self.cost[i].tolist(), strict=True)),
            "unit": self.unit,
        }

    def _refuse_wrong_sizes(self) -> None:
        n, m = len(self.prompts), len(self.models)
        if not n or m < 2:
            raise InvalidInput(f"{n} prompts and {m} models: at least 1 and 2 are needed")
        if len(set(self.models)) < m:
            raise InvalidInput(f"models={self.models}: a name appears twice")
        for name in ("right", "cost"):
            if getattr(self, name).shape != (n, m):
                raise InvalidInput(
                    f"{name} is {getattr(self, name).shape}, for {n} prompts and {m} models"
                )
        for name in _COLUMNS:
            if getattr(self, name) is not None and len(getattr(self, name)) != n:
                raise InvalidInput(f"{len(getattr(self, name))} {name} for {n} prompts")


# --- reading -------------------------------------------------------------------------------------


def _refuse_unknown(where: object, models: Sequence[str], known: Sequence[str]) -> None:
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
    under the first of these keys."""
    table = np.empty((len(rows), len(models)))
    for i, row in enumerate(rows):
        values = row if column is None else row.get(column)
        for j, name in enumerate(models):
            try:
                value = values[name]  # type: ignore[index]
                if isinstance(value, Mapping):
                    value = next(value[key] for key in keys if key in value)
                table[i, j] = _number(value)
            except (KeyError, TypeError, ValueError, OverflowError, StopIteration) as error:
                label = name if column is None else f"{column}.{name}"
                raise InvalidInput(f"{path}, row {i + 1}: no number under {label!r}") from error
    return table


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
) -> tuple[Floats, str]:
    """(n, m), and the unit that the rows state."""
    unit = str(rows[0].get("unit") or "calls")
    if any(str(row.get("unit") or "calls") != unit for row in rows):
        raise InvalidInput(f"{path}: its rows state costs in several units")
    if isinstance(cost, Mapping):
        _refuse_unknown("cost", models, list(cost))
        return np.tile([float(cost[name]) for name in models], (len(rows), 1)), unit
    if cost in rows[0]:
        return _table(path, rows, models, cost), unit
    graded = rows[0] if right is None else rows[0][right]
    if all(isinstance(graded[name], Mapping) and cost in graded[name] for name in models):
        return _table(path, rows, models, right, [cost]), unit
    if len(models) > 2:
        raise InvalidInput(
            f"{path}: no column {cost!r}; more than two models need costs (--cost-column)"
        )
    return np.tile([0.0, 1.0], (len(rows), 1)), "calls"


def _texts(path: str | Path, rows: Sequence[Row], column: str) -> tuple[str, ...] | None:
    """A column that all rows have, or none."""
    values = [row.get(column) for row in rows]
    if all(value is None for value in values):
        if column not in ("group", "wording", "question"):  # the caller named it
            raise InvalidInput(f"{path}: no column {column!r}{did_you_mean(column, rows[0])}")
        return None
    if any(value is None for value in values):
        raise InvalidInput(
            f"{path}, row {values.index(None) + 1}: no {column!r}, but others have one"
        )
    return tuple(map(str, values))
