"""What an answer cost, and what it saved against asking the strongest model."""

from __future__ import annotations

from pliant.routing.backends import Answers, Price, Used
from pliant.routing.live.decision import Decision, Reply, most_frequent
from pliant.routing.router_file import ModelEntry, RouterFile


class Costing:
    """By the prices and averages of a router's file, in its unit."""

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
        entry, unit = self._entries[decision.model], self._file.unit
        used = answers.used.priced(None if entry.price is None else Price(*entry.price))
        counted = unit != "calls" and used.known(unit)  # the file states what a call costs
        answer = used.of(unit) if counted else entry.cost * samples
        # An answer that continues from its scoring has paid for the prefill already.
        cost = answer + (0.0 if continued else self._scoring(decision))
        return Reply(
            text=most_frequent(answers.texts),
            decision=decision,
            cost=cost,
            saved=self._strongest(entry, answer / samples) - cost,
            unit=unit,
            used=used,
            texts=answers.texts,
            continued=continued,
        )

    def labels(self) -> float | None:
        """What the labels cost; None where that is unknown in the router's unit."""
        unit = self._file.unit
        used = [Used.from_dict(dict(content)) for content in self._file.label_cost.values()]
        if not all(each.known(unit) for each in used):
            return None
        return sum(each.of(unit) for each in used)

    def _strongest(self, entry: ModelEntry, cost: float) -> float:
        """What the strongest model would have cost where this one has cost so much.

        Scaled by the averages of both, so that a long prompt is long for either.
        """
        strongest = self._file.models[-1].cost
        return cost * strongest / entry.cost if entry.cost > 0 else strongest

    def _scoring(self, decision: Decision) -> float:
        return 0.0 if decision.gain is None else self._file.scorer.cost
