"""The labels of answered prompts: a row each, with who was right, at what cost, saying what."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pliant.data import Journal, Row
from pliant.errors import InvalidInput
from pliant.routing.backends.costs import Price, Used
from pliant.routing.backends.protocol import Answers, Backend, ModelSpec
from pliant.routing.labels.grading import Grader, ToGrade
from pliant.routing.prompts import Prompt, digest, messages, text_of


@dataclass(frozen=True)
class Model:
    """One of the models that prompts are labelled for."""

    spec: ModelSpec
    backend: Backend
    price: Price | None = None
    key_env: str | None = None
    """The environment variable that holds a URL's key, where it is not the usual one."""

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def reached(self) -> Reached:
        price = None if self.price is None else (self.price.prompt, self.price.answer)
        return Reached(str(self.spec), price, self.key_env)


@dataclass(frozen=True)
class Reached:
    """How a model is reached, and at what price: what a router needs to ask it again."""

    backend: str
    price: tuple[float, float] | None = None
    """Dollars for a million tokens of prompt and of answer."""
    key_env: str | None = None

    def as_dict(self) -> Row:
        """Without what is not stated."""
        return {name: value for name, value in vars(self).items() if value is not None}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Reached:
        try:
            price = found.get("price")
            return cls(
                found["backend"], None if price is None else tuple(price), found.get("key_env")
            )
        except (AttributeError, KeyError, TypeError) as error:
            raise InvalidInput(
                f"reached: not what `pliant route label` writes ({error!r})"
            ) from None


@dataclass
class Run:
    """What became of one model's prompts."""

    name: str
    answered: int = 0
    """Prompts with answers, those of earlier runs counted in."""
    new: int = 0
    """Of them, those of this run."""
    right: float = 0.0
    """Mean over the prompts that are labelled."""
    cut: int = 0
    """Answers that max_new_tokens cut off."""
    used: Used = field(default_factory=Used)
    """By all answers, those of earlier runs counted in."""
    failures: Counter[str] = field(default_factory=Counter)
    said: dict[str, str] = field(default_factory=dict)
    """The first message of each kind of failure."""

    def fails(self, error: Exception | str, kind: str, times: int = 1) -> None:
        self.failures[kind] += times
        self.said.setdefault(kind, str(error))


@dataclass(frozen=True)
class Columns:
    """Where the prompt (a text, or messages) and its reference stand."""

    prompt: str = "prompt"
    answer: str = "answer"


class Table:
    """The prompts with the journal's answers to them."""

    def __init__(
        self,
        prompts: Sequence[Row],
        columns: Columns,
        journal: Journal,
        models: Sequence[Model],
        unit: str,
    ) -> None:
        self._prompts, self._columns = prompts, columns
        self._answers = {row["key"]: row for row in journal.rows()}
        self._models, self._unit = models, unit

    def to_grade(self) -> Iterator[ToGrade]:
        """Every answer with its reference and its prompt."""
        for row, found in self._answered():
            yield from self._graded(row, found)

    def rows(self, grader: Grader, runs: Mapping[str, Run]) -> Iterator[Row]:
        """A row for each prompt that every model has answered, and the verifier has graded."""
        seen: set[str] = set()
        for row, found in self._answered():
            prompt = row[self._columns.prompt]
            if digest(prompt) not in seen:
                self._count(found, runs)
            seen.add(digest(prompt))
            right: dict[str, float] = {}
            for name, answers in found.items():
                grade = grader.grade(answers["answers"], self._reference(row), text_of(prompt))
                if isinstance(grade, str):
                    runs[name].fails(grade, "not graded")
                else:
                    right[name] = grade
            if len(right) == len(found):
                graded = grader.used(self._graded(row, found))
                judging = {} if graded is None else {"judging": graded.as_dict()}
                yield self._row(row, found, right) | {"verifier": grader.name} | judging

    def _graded(self, row: Row, found: Mapping[str, Row]) -> Iterator[ToGrade]:
        for answers in found.values():
            for text in answers["answers"]:
                yield text, self._reference(row), text_of(row[self._columns.prompt])

    def _answered(self) -> Iterator[tuple[Row, dict[str, Row]]]:
        for row in self._prompts:
            try:
                found = self._of(row[self._columns.prompt])
            except InvalidInput:  # no prompt at all: it was counted when it was not asked
                continue
            if found is not None:
                yield row, found

    def _of(self, prompt: Prompt) -> dict[str, Row] | None:
        """Each model's answers to a prompt, if all of them have answered it."""
        key = digest(prompt)
        found: dict[str, Row] = {}
        for model in self._models:
            answers = self._answers.get(answer_key(model, key))
            if answers is None:
                return None
            found[model.name] = answers
        return found

    def _row(self, row: Row, found: Mapping[str, Row], right: dict[str, float]) -> Row:
        prompt = row[self._columns.prompt]
        used = {model.name: used_by(model, found[model.name]) for model in self._models}
        said = {name: answers["answers"] for name, answers in found.items()}
        kept = {name: value for name, value in row.items() if name != self._columns.prompt}
        return {
            "prompt": text_of(prompt),
            **kept,
            **({} if isinstance(prompt, str) else {"messages": messages(prompt)}),
            "right": right,
            "cost": {name: u.of(self._unit) / len(said[name]) for name, u in used.items()},
            "unit": self._unit,
            "answers": {name: t[0] if len(t) == 1 else t for name, t in said.items()},
            "used": {name: u.as_dict() for name, u in used.items()},
            "reached": {model.name: model.reached.as_dict() for model in self._models},
        }

    def _count(self, found: Mapping[str, Row], runs: Mapping[str, Run]) -> None:
        for model in self._models:
            runs[model.name].used += used_by(model, found[model.name])
            runs[model.name].cut += found[model.name]["cut"]

    def _reference(self, row: Row) -> object:
        return row.get(self._columns.answer)


def answer_key(model: Model, prompt: str) -> str:
    return f"answer of {model.name} to {prompt}"


def answer_row(model: Model, prompt: str, found: Answers) -> Row:
    """What the journal keeps of a prompt's answers."""
    return {
        "key": answer_key(model, prompt),
        "answers": list(found.texts),
        "used": found.used.as_dict(),
        "cut": found.cut,
    }


def used_by(model: Model, answers: Row) -> Used:
    """At the price of this run, whatever it was when the answer was given."""
    return Used.from_dict(answers["used"]).priced(model.price)
