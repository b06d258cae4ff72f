"""Grade answers for labels: with a verifier, or with a judge whose verdicts are stored."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from contextlib import closing
from typing import Any

from pliant.data import Journal, Row
from pliant.errors import InvalidInput, PliantError
from pliant.routing.backends import Answers, Backend, Price, Settings, Used
from pliant.routing.backends.remote import in_parallel
from pliant.routing.prompts import digest
from pliant.verify import Judge, Verifier

ToGrade = tuple[str, Any, str]
"""An answer, its reference and its prompt."""


class Grader:
    """A verifier, which grades all answers again in every run, at negligible cost."""

    def __init__(self, verifier: Verifier) -> None:
        self._verifier, self.name = verifier, verifier.name

    def prepare(self, answers: Iterable[ToGrade], journal: Journal, shown: Any) -> Used | None:
        """Do the slow part, before `grade` is called; returns what it used."""
        return None

    def grade(self, answers: Sequence[str], reference: Any, prompt: str) -> float | str:
        """The share of the answers that are right, or why they cannot be graded."""
        try:
            right = [self._grade(answer, reference, prompt) for answer in answers]
        except PliantError as error:
            return str(error)
        return sum(right) / len(right)

    def used(self, answers: Iterable[ToGrade]) -> Used | None:
        """What grading these used, unless reported before; None for a negligible cost."""
        return None

    def _grade(self, answer: str, reference: Any, prompt: str) -> float:
        return self._verifier(answer, reference, prompt)


class JudgeGrader(Grader):
    """A judge model, whose verdicts cost something: each is stored in the journal and reused."""

    def __init__(
        self,
        backend: Backend,
        label: str,
        settings: Settings,
        *,
        price: Price | None = None,
        concurrency: int = 8,
        **options: Any,
    ) -> None:
        self._backend, self._settings, self._price = backend, settings, price
        self._nothing = Used(usd=None if price is None else 0.0)
        self._verdict_used = threading.local()
        self._concurrency = concurrency
        judge = Judge(ask=self._ask, **options)
        super().__init__(judge)
        self._label = f"{label} {digest(judge.template)[:8]}"
        self._verdicts: dict[str, float] = {}
        self._costs: dict[str, Used] = {}
        """What each verdict used, until it is reported."""
        self._failed: dict[str, str] = {}
        self._wasted: dict[str, Used] = {}
        """What answers without a verdict used, until it is reported."""

    def prepare(self, answers: Iterable[ToGrade], journal: Journal, shown: Any) -> Used | None:
        for row in journal.rows():
            key = str(row["key"])
            if key.startswith("verdict "):
                self._store(row)
            elif key.startswith(f"no verdict of {self._label} on "):
                spent = Used.from_dict(row.get("used")).priced(self._price)
                self._wasted[key.removeprefix("no ")] = spent
        new = {self._key(*answer): answer for answer in answers}
        new = {key: answer for key, answer in new.items() if key not in self._verdicts}
        keys, total = list(new), self._nothing
        with closing(in_parallel(self._verdict, list(new.values()), self._concurrency)) as judged:
            for at, (verdict, used) in shown(judged, "judging", len(new)):
                key, total = keys[at], total + used
                if isinstance(verdict, str):
                    self._failed[key] = verdict
                    spent = self._wasted[key] = self._wasted.get(key, self._nothing) + used
                    if used.calls:
                        journal.add({"key": f"no {key}", "used": spent.as_dict()})
                else:
                    row = {"key": key, "right": verdict, "used": used.as_dict()}
                    self._store(row)
                    journal.add(row)
        return total

    def used(self, answers: Iterable[ToGrade]) -> Used | None:
        """The first report includes the wasted calls, whose own rows are not written."""
        keys = {self._key(*answer) for answer in answers}
        costs = [*(self._costs.pop(key) for key in keys if key in self._costs)]
        costs += self._wasted.values()
        self._wasted = {}
        return sum(costs, self._nothing) if costs else None

    def _store(self, row: Row) -> None:
        right = row.get("right")
        if not isinstance(right, (int, float)) or not 0 <= right <= 1:
            raise InvalidInput(f"{row['key']!r}: right = {right!r} is no share from 0 to 1")
        self._verdicts[row["key"]] = right
        if "used" in row:  # at this run's price, not that of the run that stored it
            self._costs[row["key"]] = Used.from_dict(row["used"]).priced(self._price)

    def _verdict(self, answer: ToGrade) -> tuple[float | str, Used]:
        """The verdict, or why there is none, and what all its calls used."""
        self._verdict_used.total = self._nothing  # all calls for a verdict are made in one thread
        try:
            verdict: float | str = self._verifier(*answer)
        except PliantError as error:
            verdict = str(error)
        return verdict, self._verdict_used.total

    def _grade(self, answer: str, reference: Any, prompt: str) -> float:
        key = self._key(answer, reference, prompt)
        if key not in self._verdicts:
            raise PliantError(self._failed.get(key, "the judge was not asked"))
        return self._verdicts[key]

    def _key(self, answer: str, reference: Any, prompt: str) -> str:
        return f"verdict of {self._label} on {digest(repr((answer, reference, prompt)))}"

    def _ask(self, text: str) -> str:
        ((_, result),) = self._backend.ask([text], self._settings)
        if not isinstance(result, Answers):
            raise result
        self._verdict_used.total += result.used.priced(self._price)
        return result.texts[0]
