"""How answers are graded for labels: by a verifier as it is, or by a judge whose verdicts last."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from contextlib import closing
from typing import Any

from pliant.data import Journal, Row
from pliant.errors import PliantError
from pliant.routing.backends.costs import Price, Used
from pliant.routing.backends.protocol import Answers, Backend, Settings
from pliant.routing.backends.several import several
from pliant.routing.prompts import digest
from pliant.verify import Judge, Verifier

ToGrade = tuple[str, Any, str]  # an answer, its reference, its prompt


class Grader:
    """A verifier, asked anew in every run: grading costs next to nothing."""

    def __init__(self, verifier: Verifier) -> None:
        self._verifier = verifier

    @property
    def name(self) -> str:
        return self._verifier.name

    def prepare(self, answers: Iterable[ToGrade], journal: Journal, shown: Any) -> Used | None:
        """Do what takes long, before `grade` is called; returns what it used."""
        return None

    def grade(self, answers: Sequence[str], reference: Any, prompt: str) -> float | str:
        """The share of the answers that are right, or why that cannot be said."""
        try:
            found = [self._one(answer, reference, prompt) for answer in answers]
        except PliantError as error:
            return str(error)
        return sum(found) / len(found)

    def used(self, answers: Iterable[ToGrade]) -> Used | None:
        """What grading these took, as far as that was not told before; None: next to nothing."""
        return None

    def _one(self, answer: str, reference: Any, prompt: str) -> float:
        return self._verifier(answer, reference, prompt)


class JudgeGrader(Grader):
    """A judge model: its verdicts cost, so they go into the journal, and are asked for but once."""

    name = "judge"

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
        self._used, self._counting = self._nothing, threading.Lock()
        self._of_verdict = threading.local()
        self._concurrency = concurrency
        judge = Judge(ask=self._ask, **options)
        super().__init__(judge)
        self._label = f"{label} {digest(judge.template)[:8]}"
        self._verdicts: dict[str, float] = {}
        self._costs: dict[str, Used] = {}
        """Of verdicts that were not told yet."""
        self._failed: dict[str, str] = {}
        self._in_vain: dict[str, Used] = {}
        """Of answers that it gave no verdict on, until that is told."""

    def prepare(self, answers: Iterable[ToGrade], journal: Journal, shown: Any) -> Used | None:
        for row in journal.rows():
            if row["key"].startswith("verdict "):
                self._keep(row)
            elif row["key"].startswith(f"no verdict of {self._label} on "):
                spent = Used.from_dict(row["used"]).priced(self._price)
                self._in_vain[row["key"].removeprefix("no ")] = spent
        new = {self._key(*one): one for one in answers}
        new = {key: one for key, one in new.items() if key not in self._verdicts}
        keys = list(new)
        with closing(several(self._verdict, list(new.values()), self._concurrency)) as judged:
            for at, (verdict, used) in shown(judged, "judging", len(new)):
                key = keys[at]
                if isinstance(verdict, str):
                    self._failed[key] = verdict
                    spent = self._in_vain[key] = self._in_vain.get(key, self._nothing) + used
                    if used.calls:
                        journal.add({"key": f"no {key}", "used": spent.as_dict()})
                else:
                    row = {"key": key, "right": verdict, "used": used.as_dict()}
                    self._keep(row)
                    journal.add(row)
        return self._used

    def used(self, answers: Iterable[ToGrade]) -> Used | None:
        """With the first row, what was asked in vain: the rows that it was for are not written."""
        keys = {self._key(*one) for one in answers}
        costs = [*(self._costs.pop(key) for key in keys if key in self._costs)]
        costs += self._in_vain.values()
        self._in_vain = {}
        return sum(costs, self._nothing) if costs else None

    def _keep(self, row: Row) -> None:
        self._verdicts[row["key"]] = row["right"]
        if "used" in row:  # at the price of this run, whatever it was when the verdict was given
            self._costs[row["key"]] = Used.from_dict(row["used"]).priced(self._price)

    def _verdict(self, one: ToGrade) -> tuple[float | str, Used]:
        """The verdict, or why there is none, and what all that was asked for it has used."""
        self._of_verdict.used = self._nothing  # a verdict is asked for in one thread
        try:
            found: float | str = self._verifier(*one)
        except PliantError as error:
            found = str(error)
        return found, self._of_verdict.used

    def _one(self, answer: str, reference: Any, prompt: str) -> float:
        key = self._key(answer, reference, prompt)
        if key not in self._verdicts:
            raise PliantError(self._failed.get(key, "the judge was not asked"))
        return self._verdicts[key]

    def _key(self, answer: str, reference: Any, prompt: str) -> str:
        return f"verdict of {self._label} on {digest(repr((answer, reference, prompt)))}"

    def _ask(self, text: str) -> str:
        ((_, found),) = self._backend.ask([text], self._settings)
        if not isinstance(found, Answers):
            raise found
        used = found.used.priced(self._price)
        self._of_verdict.used += used
        with self._counting:
            self._used += used
        return found.texts[0]
