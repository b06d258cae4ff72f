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

from pliant.data import Row, normalised, splits, write_rows
from pliant.errors import InvalidInput, did_you_mean
from pliant.routing.outcomes_reading import read_table, refuse_unknown
from pliant.routing.prompts import Message, Prompt
from pliant.routing.units import UNITS, same_price
from pliant.stats import Floats

_COLUMNS = ("prompts", "groups", "wordings", "questions", "messages")


@dataclass(frozen=True, eq=False)
class Outcomes:
    """n prompts and m models: the cheapest first as they are read, the strongest last in a fit
    (`by_quality`)."""

    prompts: tuple[str, ...]
    models: tuple[str, ...]
    right: Floats
    """(n, m), each in [0, 1]: the share of a model's samples that were right; NaN where the model
    was not asked the prompt."""
    cost: Floats
    """(n, m): what each answer cost, in `unit`; NaN where there is none."""
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
        asked = ~np.isnan(self.right)
        if not ((self.right >= 0) & (self.right <= 1))[asked].all():
            raise InvalidInput("`right` must lie in [0, 1] for every prompt and model")
        if not ((self.cost >= 0) & np.isfinite(self.cost))[asked].all():
            raise InvalidInput("`cost` must be finite, 0 or more, for every prompt and model")
        object.__setattr__(self, "cost", np.where(asked, self.cost, np.nan))
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
    def complete(self) -> NDArray[np.bool_]:
        """(n,) whether every model was asked the prompt."""
        return np.asarray(~np.isnan(self.right).any(axis=1))

    @property
    def answers(self) -> NDArray[np.int64]:
        """(m,) how many of the prompts each model was asked."""
        return np.asarray((~np.isnan(self.right)).sum(axis=0))

    def shared(self) -> Outcomes:
        """The prompts that every model was asked: models are compared on these alone, because a
        model that was asked the easy prompts would look better than it is."""
        complete = self.complete
        if complete.all():
            return self
        if not complete.any():
            pairs = zip(self.models, self.answers, strict=True)
            counts = ", ".join(f"{name} {number:,}" for name, number in pairs)
            raise InvalidInput(
                f"no prompt was asked of every model, so they cannot be compared (of {len(self):,} "
                f"prompts: {counts}): label some prompts with all of them, or name the models to "
                "compare (models=, --model)"
            )
        return self.select(complete)

    @property
    def mean_right(self) -> Floats:
        """(m,) how often each model is right on the prompts that every model was asked."""
        return np.asarray(self.shared().right.mean(axis=0))

    @property
    def mean_cost(self) -> Floats:
        """(m,) what an answer of each model costs on the prompts that every model was asked."""
        return np.asarray(self.shared().cost.mean(axis=0))

    @property
    def best(self) -> int:
        """The index of the model that is right most often; of equals, the cheapest."""
        return int(np.lexsort((self.mean_cost, -self.mean_right))[0])

    @property
    def strong_costs_no_more(self) -> bool:
        """Whether the last model is no more expensive than any other."""
        costs = self.mean_cost
        return bool(costs[-1] <= costs.min() * (1 + 1e-9))

    @property
    def same_price(self) -> bool:
        """Whether an answer costs the same whichever model gives it."""
        return same_price(self.mean_cost.tolist())

    def refuse_incomplete(self, what: str) -> None:
        """Refuse prompts that not every model was asked, for `what` needs all grades."""
        missing = int((~self.complete).sum())
        if missing:
            raise InvalidInput(
                f"{what}: not every model was asked {missing:,} of these {len(self):,} prompts; "
                "`shared()` selects the others"
            )

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
        messages: str | None = None,
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
        objects, {"correct": true, "cost": 0.01}, which need no names. A model that is missing in a
        row, or null, was not asked that prompt. `models` are named the cheapest first; left out,
        they are ordered by their mean cost. `cost` may also be a price of a call for each model.
        The prompts are in `prompt` or, where that is given, in the conversations of `messages`.
        Without any costs a call of the first of two models costs 0 and of the second 1, in "calls".
        """
        columns = {"group": group, "wording": wording, "question": question}
        table = read_table(path, models, (prompt, messages), columns, right, cost, limit)
        result = cls(**table | {"unit": unit or table["unit"]})
        if models is None:
            return result.by_cost()
        # Rows that hold grades of other models alone are no labels of these.
        return result.select(~np.isnan(result.right).all(axis=1))

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
        refuse_unknown("these outcomes", models, self.models)
        at = [self.models.index(name) for name in models]
        return replace(self, models=tuple(models), right=self.right[:, at], cost=self.cost[:, at])

    def by_cost(self) -> Outcomes:
        """The cheapest model first; of equally expensive ones, the better one last."""
        order = np.lexsort((self.mean_right, self.mean_cost))
        return self.of_models([self.models[j] for j in order])

    def by_quality(self) -> Outcomes:
        """The model that is right most often last, whatever it costs, and the one that is right
        least often first; of equals, the cheaper one counts as the stronger."""
        order = np.lexsort((-self.mean_cost, self.mean_right))
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
        asked = np.flatnonzero(~np.isnan(self.right[i]))
        return {
            "prompt": self.prompts[i],
            **{name: value for name, value in present.items() if value is not None},
            "right": {self.models[j]: float(self.right[i, j]) for j in asked},
            "cost": {self.models[j]: float(self.cost[i, j]) for j in asked},
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
