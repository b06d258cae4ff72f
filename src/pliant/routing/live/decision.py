"""What a router decides and why, the reply that it gets, and what that cost and saved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pliant.routing.backends import Answers, Price, Used
from pliant.routing.router_file import ModelEntry, RouterFile


@dataclass(frozen=True)
class Decision:
    """Which model answers a prompt, and why."""

    model: str
    score: float | None
    """The probability that the first model, which is right least often, fails; None where it was
    not scored."""
    gain: float | None
    """P(the strongest model is right) - P(the first is), in [-1, 1]; of more than two models
    `probabilities` says more."""
    reason: str
    wanted: str
    """The preferred model, if it had been up and the prompt had fitted its context."""
    novel: bool = False
    """Whether the prompt is unlike those that the router was fitted on."""
    from_session: bool = False
    """Whether this is the session's model."""
    probabilities: dict[str, float] | None = None
    """P(right) of each model, calibrated; None where it was not scored, or the scorer predicts
    none."""

    @property
    def fell_over(self) -> bool:
        return self.model != self.wanted

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Reply:
    """An answer, which model gave it, and what it cost."""

    text: str
    decision: Decision
    cost: float
    """In the router's unit; the labels' average where the answer's own is unknown."""
    saved: float
    """Against the strongest model on the same prompt, by the ratio of their average costs; below 0
    if the answer cost more, as one of the strongest model does by its scoring."""
    unit: str
    used: Used
    texts: tuple[str, ...]
    """All samples; `text` is the most frequent one, the first of those."""
    strongest: str = ""
    """The model that `saved` is measured against."""
    continued: bool = False
    """Whether the answer continued from the prefill that scored the prompt."""
    answer_cost: float = 0.0
    """Of `cost`, the part of the answer, without scoring."""
    row: int | None = None
    """Of the decision in the ledger, by which the answer can be graded later."""
    explored: tuple[str, ...] = ()
    """The models that were asked as well, to learn from."""

    @property
    def model(self) -> str:
        return self.decision.model

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "used": self.used.as_dict(), "model": self.model}


def most_frequent(texts: Sequence[str]) -> str:
    """The answer that most samples agree on, without regard to white space at both ends."""
    stripped = [text.strip() for text in texts]
    return texts[stripped.index(max(stripped, key=stripped.count))]


class Costing:
    """What answers cost and save, by the prices and averages of a router's file, in its unit."""

    def __init__(self, file: RouterFile) -> None:
        self._file = file
        self._entries = {entry.name: entry for entry in file.models}

    def expected(self, decision: Decision) -> tuple[float, float]:
        """Cost and saving of a decision before there is an answer, by the averages."""
        entry = self._entries[decision.model]
        cost = entry.cost + self._scoring(decision)
        return cost, self._strongest(entry, entry.cost) - cost

    def reply(
        self, decision: Decision, answers: Answers, samples: int, continued: bool = False
    ) -> Reply:
        """The answer with its cost; by the average where its own is unknown."""
        entry = self._entries[decision.model]
        used = self._used(entry, answers)
        answer = self._paid(entry, used, samples)
        # An answer that continues from its scoring has paid for the prefill already.
        cost = answer + (0.0 if continued else self._scoring(decision))
        return Reply(
            text=most_frequent(answers.texts),
            decision=decision,
            cost=cost,
            saved=self._strongest(entry, answer / samples) - cost,
            unit=self._file.unit,
            used=used,
            texts=answers.texts,
            strongest=self._file.models[-1].name,
            continued=continued,
            answer_cost=answer,
        )

    def of_answer(self, model: str, answers: Answers) -> float:
        """What a model's answer cost, without any scoring."""
        entry = self._entries[model]
        return self._paid(entry, self._used(entry, answers), len(answers.texts))

    def labels(self) -> float | None:
        """What the labels cost; None where that is unknown in the router's unit."""
        total = 0.0
        for cost in self.labels_by_model().values():
            if cost is None:
                return None
            total += cost
        return total

    def labels_by_model(self) -> dict[str, float | None]:
        """What each model's labels cost, and the judge's verdicts if one graded them.

        In calls each counts what the file says that a call of its model costs; a judge's, one.
        """
        unit, costs = self._file.unit, {}
        for name, content in self._file.label_cost.items():
            used = Used.from_dict(dict(content))
            each = self._entries[name].cost if unit == "calls" and name in self._entries else 1.0
            costs[name] = each * used.of(unit) if used.known(unit) else None
        return costs

    def _used(self, entry: ModelEntry, answers: Answers) -> Used:
        return answers.used.priced(None if entry.price is None else Price(*entry.price))

    def _paid(self, entry: ModelEntry, used: Used, samples: int) -> float:
        unit = self._file.unit
        counted = unit != "calls" and used.known(unit)  # the file states what a call costs
        return used.of(unit) if counted else entry.cost * samples

    def _strongest(self, entry: ModelEntry, cost: float) -> float:
        """What the strongest model would have cost where this one has cost so much.

        Scaled by the averages of both, so that a long prompt is long for either.
        """
        strongest = self._file.models[-1].cost
        return cost * strongest / entry.cost if entry.cost > 0 else strongest

    def _scoring(self, decision: Decision) -> float:
        return 0.0 if decision.gain is None else self._file.scorer.cost
