"""The rows of a label table: for each answered prompt who is right, at what cost, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pliant.data import Journal, Row
from pliant.errors import InvalidInput, check_whole
from pliant.routing.backends import Answers, Backend, ModelSpec, Price, PromptFormat, Used
from pliant.routing.labels.grading import Grader, ToGrade
from pliant.routing.prompts import digest, messages, text_of

ANSWER = "answer of "
"""How the keys of a journal's answers begin."""


@dataclass(frozen=True)
class Model:
    """A model to label prompts for."""

    spec: ModelSpec
    backend: Backend
    price: Price | None = None
    key_env: str | None = None
    """The environment variable with the key of a URL, if it is not the default one."""
    prompt_format: PromptFormat = PromptFormat()
    """That of the backend."""

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def description(self) -> BackendDescription:
        price = None if self.price is None else (self.price.prompt, self.price.answer)
        return BackendDescription(
            str(self.spec), price, self.key_env, self.prompt_format.as_dict() or None
        )


@dataclass(frozen=True)
class BackendDescription:
    """A model's backend and price: what a router needs to ask it again."""

    backend: str
    price: tuple[float, float] | None = None
    """Dollars for a million tokens of prompt and of answer."""
    key_env: str | None = None
    prompt_format: dict[str, Any] | None = None

    def as_dict(self) -> Row:
        """Without missing values."""
        return {name: value for name, value in vars(self).items() if value is not None}

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> BackendDescription:
        try:
            price = row.get("price")
            price = None if price is None else tuple(price)
            return cls(row["backend"], price, row.get("key_env"), row.get("prompt_format"))
        except (AttributeError, KeyError, TypeError):
            raise InvalidInput(
                f"reached = {str(row)[:60]!r} is not what `pliant route label` writes"
            ) from None


@dataclass
class ModelReport:
    """How labelling went for one model."""

    name: str
    answered: int = 0
    """Prompts with answers, including those of earlier runs."""
    new: int = 0
    """Those that this run answered."""
    right: float = 0.0
    """The mean over the labelled prompts."""
    truncated: int = 0
    """Answers that max_new_tokens truncated."""
    used: Used = field(default_factory=Used)
    """What all answers used, including those of earlier runs."""
    failures: Counter[str] = field(default_factory=Counter)
    messages: dict[str, str] = field(default_factory=dict)
    """The first message of each kind of failure."""

    def add_failure(self, error: Exception | str, kind: str, times: int = 1) -> None:
        self.failures[kind] += times
        self.messages.setdefault(kind, str(error))

    def as_dict(self) -> Row:
        """For JSON."""
        return {**asdict(self), "failures": dict(self.failures), "used": self.used.as_dict()}


@dataclass(frozen=True)
class Columns:
    """The columns of the prompt (a text, or messages) and of its reference."""

    prompt: str = "prompt"
    answer: str = "answer"


class LabelTable:
    """The prompts, joined with the journal's answers to them."""

    def __init__(
        self,
        prompts: Sequence[Row],
        columns: Columns,
        journal: Journal,
        models: Sequence[Model],
        unit: str,
        partial: bool = False,
    ) -> None:
        self._columns, self._models, self._unit = columns, models, unit
        self._needed = 1 if partial else len(models)
        """How many models must have answered a prompt, and been graded on it."""
        self._answered: list[tuple[str, Row, dict[str, Row]]] = []
        """For each prompt that enough models answered: digest, row, and the answers by model."""
        stored = {row["key"]: row for row in journal.rows()}
        for row in stored.values():
            _check_answers(row, journal)
        for row in prompts:
            try:
                key = digest(row[columns.prompt])
            except InvalidInput:  # not a prompt: its failure is counted already
                continue
            keys = {model.name: answer_key(model, key) for model in models}
            answered = {model: stored[name] for model, name in keys.items() if name in stored}
            if len(answered) >= self._needed:
                self._answered.append((key, row, answered))

    def to_grade(self) -> Iterator[ToGrade]:
        """Every answer with its reference and its prompt."""
        for _, row, answered in self._answered:
            yield from self._answers_to_grade(row, answered)

    def rows(self, grader: Grader, reports: Mapping[str, ModelReport]) -> Iterator[Row]:
        """A row for each prompt that enough models answered and the verifier graded."""
        seen: set[str] = set()
        for key, row, answered in self._answered:
            if key not in seen:
                self._count(answered, reports)
            seen.add(key)
            reference, prompt = row.get(self._columns.answer), text_of(row[self._columns.prompt])
            right: dict[str, float] = {}
            for name, answers in answered.items():
                grade = grader.grade(answers["answers"], reference, prompt)
                if isinstance(grade, str):
                    reports[name].add_failure(grade, "not graded")
                else:
                    right[name] = grade
            if len(right) >= self._needed:
                used = grader.used(self._answers_to_grade(row, answered))
                judging = {} if used is None else {"judging": used.as_dict()}
                yield self._row(row, answered, right) | {"verifier": grader.name} | judging

    def _answers_to_grade(self, row: Row, answered: Mapping[str, Row]) -> Iterator[ToGrade]:
        reference, prompt = row.get(self._columns.answer), text_of(row[self._columns.prompt])
        for answers in answered.values():
            for text in answers["answers"]:
                yield text, reference, prompt

    def _count(self, answered: Mapping[str, Row], reports: Mapping[str, ModelReport]) -> None:
        for model in self._models:
            if model.name in answered:
                reports[model.name].used += used_by(model, answered[model.name])
                reports[model.name].truncated += answered[model.name]["cut"]

    def _row(self, row: Row, answered: Mapping[str, Row], right: dict[str, float]) -> Row:
        prompt = row[self._columns.prompt]
        used = {m.name: used_by(m, answered[m.name]) for m in self._models if m.name in answered}
        texts = {name: answers["answers"] for name, answers in answered.items()}
        rest = {name: value for name, value in row.items() if name != self._columns.prompt}
        return {
            "prompt": text_of(prompt),
            **rest,
            **({} if isinstance(prompt, str) else {"messages": messages(prompt)}),
            "right": right,
            "cost": {name: used[name].of(self._unit) / len(texts[name]) for name in right},
            "unit": self._unit,
            "answers": {name: t[0] if len(t) == 1 else t for name, t in texts.items()},
            "used": {name: u.as_dict() for name, u in used.items()},
            "reached": {model.name: model.description.as_dict() for model in self._models},
        }


def answer_key(model: Model, prompt: str) -> str:
    return f"{ANSWER}{model.name} to {prompt}"


def answer_row(model: Model, prompt: str, answers: Answers) -> Row:
    """The journal's row of a prompt's answers."""
    return {
        "key": answer_key(model, prompt),
        "answers": list(answers.texts),
        "used": answers.used.as_dict(),
        "cut": answers.truncated,
    }


def _check_answers(row: Row, journal: Journal) -> None:
    """Refuse answers that somebody has edited so that they are none."""
    if not str(row["key"]).startswith(ANSWER):
        return
    texts, cut = row.get("answers"), row.get("cut")
    try:
        if not (isinstance(texts, list) and texts and all(isinstance(t, str) for t in texts)):
            raise InvalidInput(f"answers = {texts!r}: give a list of texts")
        check_whole("cut", cut, 0)
        Used.from_dict(row.get("used"))
    except InvalidInput as error:
        raise InvalidInput(f"{journal.path}, {row['key']!r}: {error}") from None


def used_by(model: Model, answers: Row) -> Used:
    """At this run's price, not that of the run that stored the answer."""
    return Used.from_dict(answers["used"]).priced(model.price)
