"""The grades of a ledger's answers, and the answers of prompts that every model was asked.

An answer that was returned can be graded at any time. Of an explored prompt the ledger also holds
the other models' answers; once all of them are graded, the prompt is a label (`labelled`).
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pliant.errors import InvalidInput, did_you_mean
from pliant.routing.live.ledger_file import LedgerFile
from pliant.routing.prompts import Message, Prompt, digest, messages


@dataclass(frozen=True)
class StoredAnswer:
    """One model's answer to an explored prompt."""

    row: int
    """Of the decision in the ledger."""
    model: str
    prompt: str
    answer: str
    right: float | None
    """Its grade, from 0 to 1; None until it is graded."""

    def as_dict(self) -> dict[str, Any]:
        """A row for `pliant route grade`, once `right` is filled in."""
        return {"id": self.row, **{k: v for k, v in vars(self).items() if k != "row"}}


@dataclass(frozen=True)
class Grade:
    """A grade of one answer of a decision, or of all answers of a model to a prompt."""

    right: float
    row: int | None = None
    """Of the decision."""
    prompt: Prompt | None = None
    model: str | None = None
    """By default the one whose answer was returned."""

    @classmethod
    def of_row(cls, row: Mapping[str, Any], where: str) -> Grade:
        """From a table's row: id and right (and model), or prompt, model and right."""
        at, prompt, model = row.get("id"), row.get("prompt"), row.get("model") or None
        try:
            right = _number(row["right"])
            if at is not None and at != "":
                return cls(right, int(at), model=model)
            if prompt is None or model is None:
                raise InvalidInput("a grade needs an id, or a prompt and a model")
            messages(prompt)  # refuses what is none
            return cls(right, prompt=prompt, model=str(model))
        except (InvalidInput, TypeError, ValueError) as error:
            raise InvalidInput(f"{where}: {error}") from None


@dataclass(frozen=True)
class Labelled:
    """An explored prompt with a grade and a cost for each model that answered."""

    row: int
    hash: str
    prompt: str
    messages: tuple[Message, ...] | None
    """The conversation, if it is more than the text."""
    group: str | None
    right: Mapping[str, float]
    cost: Mapping[str, float]


class Grades:
    """What is known about the answers in a ledger's file."""

    def __init__(self, file: LedgerFile) -> None:
        self._file = file

    def explored(
        self,
        row: int,
        prompt: Prompt,
        group: str | None,
        answers: Mapping[str, tuple[str, float]],
        failures: Sequence[str],
    ) -> None:
        """Store the answers to a prompt that every model was asked: text and cost by model.

        The model that the decision names answered the user; the others are extra.
        """
        conversation = None if isinstance(prompt, str) else json.dumps(messages(prompt))
        with self._file.transaction() as base:
            (returned,) = base.execute(
                "SELECT model FROM decisions WHERE id = ?", (row,)
            ).fetchone()
            base.execute(
                "INSERT OR REPLACE INTO explorations VALUES (?, ?, ?, ?)",
                (row, conversation, group, "; ".join(failures) or None),
            )
            base.executemany(
                "INSERT OR REPLACE INTO answers (decision, model, answer, cost, extra) "
                "VALUES (?, ?, ?, ?, ?)",
                [
                    (row, name, text, cost, name != returned)
                    for name, (text, cost) in answers.items()
                ],
            )

    def grade(self, row: int, right: float | bool, model: str | None = None) -> None:
        """Grade an answer of a decision, by default the one that was returned; the latest counts.

        `right` is a share from 0 to 1.
        """
        self.record([Grade(checked(right), row, model=model)])

    def grade_prompt(self, prompt: Prompt, model: str, right: float | bool) -> int:
        """Grade every answer of a model to this prompt; returns how many there are."""
        return self.record([Grade(checked(right), prompt=prompt, model=model)])[0]

    def record(self, grades: Iterable[Grade]) -> list[int]:
        """Record all of these, or none if one of them is wrong; how many answers each grades."""
        with self._file.transaction() as base:
            return [self._record(base, grade) for grade in grades]

    def _record(self, base: sqlite3.Connection, grade: Grade) -> int:
        if grade.row is not None:
            self._grade(base, grade.row, grade.right, grade.model)
            return 1
        assert grade.prompt is not None
        rows = base.execute(
            "SELECT id FROM decisions WHERE hash = ? AND (model = ? AND outcome = 'answered' "
            "OR EXISTS (SELECT 1 FROM answers WHERE decision = id AND answers.model = ?))",
            (digest(grade.prompt, self._file.salt), grade.model, grade.model),
        ).fetchall()
        for (row,) in rows:
            self._grade(base, row, grade.right, grade.model)
        return len(rows)

    def _grade(self, base: sqlite3.Connection, row: int, right: float, model: str | None) -> None:
        decision = base.execute(
            "SELECT model, outcome, cost FROM decisions WHERE id = ?", (row,)
        ).fetchone()
        if decision is None:
            raise InvalidInput(f"the ledger has no decision {row}")
        returned, outcome, cost = decision
        stored = base.execute("SELECT model FROM answers WHERE decision = ?", (row,))
        asked = {name for (name,) in stored} | ({returned} if outcome == "answered" else set())
        model = returned if model is None else model
        if model not in asked:
            raise InvalidInput(
                f"decision {row} has no answer of {model!r}{did_you_mean(model, sorted(asked))}"
            )
        base.execute(
            "INSERT INTO answers (decision, model, cost, extra, grade) VALUES (?, ?, ?, 0, ?) "
            "ON CONFLICT (decision, model) DO UPDATE SET grade = excluded.grade",
            (row, model, cost, right),
        )

    def answers(self, graded: bool | None = None) -> list[StoredAnswer]:
        """The answers to explored prompts: all of them, or those with (or without) a grade."""
        which = {None: "", True: "AND grade IS NOT NULL", False: "AND grade IS NULL"}[graded]
        with self._file.reading() as base:
            rows = base.execute(
                "SELECT decision, answers.model, prompt, answer, grade FROM answers JOIN decisions "
                f"ON id = decision WHERE answer IS NOT NULL {which} ORDER BY decision, extra"
            ).fetchall()
        return [StoredAnswer(*row) for row in rows]

    def labelled(self, models: Sequence[str]) -> list[Labelled]:
        """The explored prompts for which each of these models has a grade, the oldest first."""
        with self._file.reading() as base:
            explored = base.execute(
                'SELECT decision, hash, prompt, messages, "group" FROM explorations JOIN decisions '
                "ON id = decision WHERE prompt IS NOT NULL ORDER BY decision"
            ).fetchall()
            graded = base.execute(
                "SELECT decision, model, grade, cost FROM answers WHERE grade IS NOT NULL"
            ).fetchall()
        right: dict[int, dict[str, float]] = {}
        cost: dict[int, dict[str, float]] = {}
        for row, model, share, paid in graded:
            right.setdefault(row, {})[model] = share
            cost.setdefault(row, {})[model] = paid
        return [
            Labelled(row, hashed, text, _conversation(sent), group, right[row], cost[row])
            for row, hashed, text, sent, group in explored
            if all(name in right.get(row, {}) for name in models)
        ]

    def exploration(self) -> dict[str, float]:
        """How many prompts were asked of every model, and what the other models' answers cost."""
        with self._file.reading() as base:
            prompts, failures = base.execute(
                "SELECT COUNT(*), COUNT(failures) FROM explorations"
            ).fetchone()
            answers, cost = base.execute(
                "SELECT COUNT(*), SUM(cost) FROM answers WHERE extra"
            ).fetchone()
            (graded,) = base.execute(
                "SELECT COUNT(*) FROM explorations WHERE NOT EXISTS (SELECT 1 FROM answers "
                "WHERE answers.decision = explorations.decision AND grade IS NULL)"
            ).fetchone()
        return {
            "prompts": prompts,
            "answers": answers,
            "failures": failures,
            "cost": cost or 0.0,
            "graded": graded,
        }

    def count(self) -> int:
        """How many answers have a grade."""
        with self._file.reading() as base:
            (graded,) = base.execute("SELECT COUNT(grade) FROM answers").fetchone()
        return int(graded)


def checked(right: Any) -> float:
    """A grade as a share from 0 to 1."""
    is_number = isinstance(right, (bool, int, float))
    if not is_number or not 0 <= right <= 1:
        raise InvalidInput(f"right={right!r}: a grade is true, false or a share from 0 to 1")
    return float(right)


def _number(right: Any) -> float:
    """A grade from a table, where it may be text."""
    if isinstance(right, str):
        text = right.strip().lower()
        right = float({"true": "1", "false": "0"}.get(text, text))
    return checked(right)


def _conversation(sent: str | None) -> tuple[Message, ...] | None:
    return None if sent is None else tuple(json.loads(sent))
