"""The reward of an answer: verifiers and Python functions with weights, which may fail.

    reward = Reward("exact=0.8", "contains=0.2", brevity)
    reward.score(["Paris"], ["Paris"])                      # [1.0 + whatever brevity gives]
    GRPOTrainer(..., reward_funcs=reward)                   # trl calls it as it calls a function

Training goes on when a part of a reward raises, hangs or returns no finite number: the part then
counts as `on_failure`, and `failures` counts how often what happened.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pliant.errors import InvalidInput, check_whole
from pliant.experts.reward_parts import OpenJudge, RewardPart, parse_part
from pliant.verify import TEXT_VERIFIERS, NoVerdict, Verifier
from pliant.verify.time_limit import TimedOut, call_within

_LARGEST = 3.4e38  # trainers hold rewards in float32


class RewardWarning(UserWarning):
    """A part of a reward failed for the first time in this way."""


class Reward:
    """A weighted sum of verifiers and functions, each of which may fail.

    A part is a line such as `contains=0.5` (see `parse_part`), a verifier, a function, or a
    `RewardPart`, which has a weight. A function gives any finite number. It takes the answer, the
    reference and the prompt, as many of them as it has parameters; or it is written for trl and
    takes `completions`. `seconds` is the longest call for one answer, on top of what a verifier
    allows by itself. `answer_column` is the column of the references, and `concurrency` how many
    answers run or are judged at a time.
    """

    def __init__(
        self,
        *parts: str | Verifier | Callable[..., Any] | RewardPart,
        on_failure: float = 0.0,
        seconds: float = 10.0,
        answer_column: str = "answer",
        concurrency: int = 4,
        open_judge: OpenJudge | None = None,
    ) -> None:
        if not (isinstance(on_failure, (int, float)) and abs(on_failure) <= _LARGEST):
            raise InvalidInput(f"on_failure = {on_failure!r}: give a finite number")
        if not (isinstance(seconds, (int, float)) and 0 < seconds < math.inf):
            raise InvalidInput(f"seconds = {seconds!r}: give a number above 0")
        check_whole("concurrency", concurrency, 1)
        self.parts = tuple(_part(part, open_judge) for part in parts)
        self._check_parts()
        self.on_failure, self.seconds, self.answer_column = on_failure, seconds, answer_column
        self.concurrency = concurrency
        self.answers = 0
        """How many answers were scored."""
        self._failures: dict[str, Counter[str]] = {}
        self._first: dict[str, str] = {}
        self._sums = dict.fromkeys((part.label for part in self.parts), 0.0)
        self._lock = threading.Lock()
        self.__name__ = "reward"  # trl names its logs by it

    def __call__(
        self, prompts: Sequence[Any] | None = None, *, completions: Sequence[Any], **columns: Any
    ) -> list[float]:
        """The rewards of completions, as trl asks for them; the columns have the references.

        Prompts and completions are texts or conversations.
        """
        count = len(completions)
        if prompts is not None and len(prompts) != count:
            raise InvalidInput(f"{len(prompts)} prompts and {count} completions: give one for each")
        rows = {name: column for name, column in columns.items() if _is_column(column, count)}
        self.check(rows)
        texts = [_text(completion) for completion in completions]
        asked = [None] * count if prompts is None else [_text(prompt) for prompt in prompts]
        if not count:
            return []
        totals = [0.0] * count
        self.load()
        for part in self.parts:
            if part.in_batches:
                values = self._batch(part, prompts, completions, columns)
            else:
                references = self._references(part, rows, count)
                values = self._values(part, list(zip(texts, references, asked, strict=True)))
            self._sums[part.label] += sum(values)
            totals = [total + part.weight * x for total, x in zip(totals, values, strict=True)]
        self.answers += count
        return [self._checked("sum", total) for total in totals]

    def score(
        self,
        answers: Sequence[str],
        references: Sequence[Any] | None = None,
        prompts: Sequence[str] | None = None,
    ) -> list[float]:
        """The rewards of answers, with a reference and a prompt for each if there are any."""
        columns = {} if references is None else {self.answer_column: list(references)}
        if references is not None and len(references) != len(answers):
            raise InvalidInput(
                f"{len(answers)} answers and {len(references)} references: give one for each"
            )
        return self(prompts, completions=answers, **columns)

    def load(self) -> None:
        """Load the models behind its parts: one that is missing is an error of the settings."""
        for part in self.parts:
            part.load()

    def check(self, columns: Iterable[str]) -> None:
        """Refuse rows without the columns that its parts need, before training begins."""
        names = list(columns)
        for part in self.parts:
            own = bool(part.row_columns) and set(part.row_columns) <= set(names)
            if part.needs_reference and not own and self.answer_column not in names:
                needed = " or ".join(repr(name) for name in (*part.row_columns, self.answer_column))
                there = ", ".join(names) or "no columns of references"
                raise InvalidInput(f"{part.label} needs the column {needed}; there are: {there}")

    def check_references(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Refuse a reference that a verifier of texts cannot use, whatever the answer is."""
        parts = [part for part in self.parts if type(part.measure) in TEXT_VERIFIERS]
        for number, row in enumerate(rows, 1):
            for part in parts:
                verifier: Any = part.measure
                try:
                    verifier("", row.get(self.answer_column))
                except InvalidInput as error:
                    raise InvalidInput(f"row {number} of the task: {error}") from error

    # --- what it has seen ------------------------------------------------------------------------

    @property
    def failures(self) -> dict[str, dict[str, int]]:
        """How often each part failed, by kind: "timed out", "raised ValueError", ..."""
        return {label: dict(kinds) for label, kinds in self._failures.items()}

    @property
    def means(self) -> dict[str, float]:
        """The mean value of each part, without its weight."""
        return {label: total / max(1, self.answers) for label, total in self._sums.items()}

    def as_dict(self) -> dict[str, Any]:
        means = self.means
        return {
            "answers": self.answers,
            "parts": [
                {"reward": part.label, "weight": part.weight, "mean": means[part.label]}
                for part in self.parts
            ],
            "failures": self.failures,
            "first_failures": dict(self._first),
        }

    def __str__(self) -> str:
        parts = " + ".join(f"{part.weight:g} {part.label}" for part in self.parts)
        failed = [
            f"{times:,} x {label} {kind}"
            for label, kinds in self._failures.items()
            for kind, times in kinds.items()
        ]
        return f"{parts}: {self.answers:,} answers, {', '.join(failed) or 'none failed'}"

    # --- one part --------------------------------------------------------------------------------

    def _values(self, part: RewardPart, answers: list[tuple[str, Any, str | None]]) -> list[float]:
        if not part.concurrent or self.concurrency == 1 or len(answers) == 1:
            return [self._attempt(part, part.value, *answer) for answer in answers]
        with ThreadPoolExecutor(min(self.concurrency, len(answers))) as pool:
            return list(pool.map(lambda answer: self._attempt(part, part.value, *answer), answers))

    def _batch(
        self, part: RewardPart, prompts: Any, completions: Any, columns: Mapping[str, Any]
    ) -> list[float]:
        """The values of a function in trl's form; if it fails as a whole, all of them fail."""
        count = len(completions)
        values = self._outcome(
            part, self.seconds * count, part.values, prompts, completions, columns
        )
        if isinstance(values, _Failure):
            return [self._failed(part.label, values) for _ in range(count)]
        try:
            listed = list(values)
        except TypeError:
            listed = []
        if len(listed) != count:
            failure = _Failure("returned no list of one value an answer", repr(values)[:80])
            return [self._failed(part.label, failure) for _ in range(count)]
        return [self._checked(part.label, value) for value in listed]

    def _attempt(self, part: RewardPart, function: Callable[..., Any], *arguments: Any) -> float:
        value = self._outcome(part, self.seconds + part.own_seconds, function, *arguments)
        return self._checked(part.label, value)

    def _outcome(
        self, part: RewardPart, seconds: float, function: Callable[..., Any], *arguments: Any
    ) -> Any:
        """What a call returns, or how it failed."""
        try:
            return call_within(seconds, function, *arguments)
        except TimedOut:
            return _Failure("timed out", f"no value after {seconds:g} s")
        except NoVerdict as error:
            return _Failure("no verdict", str(error))
        except (Exception, SystemExit) as error:  # a user's function may raise anything
            return _Failure(f"raised {type(error).__name__}", str(error))

    def _checked(self, label: str, value: Any) -> float:
        """The value as a number; a failure if it is none."""
        if isinstance(value, _Failure):
            return self._failed(label, value)
        kind = f"returned {type(value).__name__}"
        if value is None or isinstance(value, (str, bytes)):
            return self._failed(label, _Failure("returned None" if value is None else kind))
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        except Exception:
            return self._failed(label, _Failure(kind))
        if math.isnan(number):
            return self._failed(label, _Failure("returned NaN"))
        if abs(number) > _LARGEST:
            return self._failed(label, _Failure("returned infinity"))
        return number

    def _failed(self, label: str, failure: _Failure) -> float:
        with self._lock:
            kinds = self._failures.setdefault(label, Counter())
            kinds[failure.kind] += 1
            first = kinds[failure.kind] == 1
            name = f"{label} {failure.kind}"
            if first:
                self._first[name] = failure.message
        if first:
            message = f"reward {name}" + (f": {failure.message}" if failure.message else "")
            warnings.warn(f"{message}; it counts as {self.on_failure:g}", RewardWarning, 2)
        return self.on_failure

    # --- its settings and its rows ---------------------------------------------------------------

    def _check_parts(self) -> None:
        if not self.parts:
            raise InvalidInput("a reward needs at least one part, such as 'exact'")
        if not any(part.weight for part in self.parts):
            raise InvalidInput("all weights of the reward are 0: such a reward teaches nothing")
        labels = [part.label for part in self.parts]
        for label in labels:
            if labels.count(label) > 1:
                raise InvalidInput(f"two parts of the reward are called {label!r}: give a label")

    def _references(
        self, part: RewardPart, rows: Mapping[str, Sequence[Any]], count: int
    ) -> list[Any]:
        if part.row_columns and set(part.row_columns) <= set(rows):
            return [{name: column[i] for name, column in rows.items()} for i in range(count)]
        return list(rows.get(self.answer_column, [None] * count))


class _Failure:
    """How a part failed."""

    def __init__(self, kind: str, message: str = "") -> None:
        self.kind, self.message = kind, " ".join(message.split())[:200]


def _part(part: Any, open_judge: OpenJudge | None) -> RewardPart:
    if isinstance(part, RewardPart):
        return part
    return parse_part(part, open_judge) if isinstance(part, str) else RewardPart(part)


def _is_column(column: Any, count: int) -> bool:
    return isinstance(column, Sequence) and not isinstance(column, str) and len(column) == count


def _text(value: Any) -> str:
    """A text, or the contents of a conversation's messages as one."""
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, Sequence):
        raise InvalidInput(f"{value!r} is neither a text nor a list of messages")
    return "\n\n".join(filter(None, map(_content, value)))


def _content(message: Any) -> str:
    content = message.get("content") if isinstance(message, Mapping) else message
    if content is None or isinstance(content, str):
        return content or ""
    parts = [part.get("text") for part in content if isinstance(part, Mapping)]
    return "".join(part for part in parts if isinstance(part, str))
