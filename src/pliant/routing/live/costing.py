"""What an answer cost, and what it saved against asking the strongest model."""

from __future__ import annotations

from pliant.routing.backends.costs import Price, Used
from pliant.routing.backends.protocol import Answers
from pliant.routing.live.decision import Decision, Reply, said_most
from pliant.routing.router_file import ModelEntry, RouterFile


class Costing:
    """By the prices and averages of a router's file, in its unit."""

    def __init__(self, file: RouterFile) -> None:
        self._file = file
        self._entries = {entry.name: entry for entry in file.models}

    def expected(self, decision: Decision) -> tuple[float, float]:
        """Cost and saving of a decision, as long as nobody has answered: the averages."""
        entry = self._entries[decision.model]
        cost = entry.cost + self._scoring(decision)
        return cost, self._strong(entry, entry.cost) - cost

    def reply(
        self, decision: Decision, answers: Answers, samples: int, continued: bool = False
    ) -> Reply:
        """The answer with its cost; by the average where its own is not known."""
        entry, unit = self._entries[decision.model], self._file.unit
        used = answers.used.priced(None if entry.price is None else Price(*entry.price))
        counted = unit != "calls" and used.known(unit)  # a call costs what the file says of it
        answer = used.of(unit) if counted else entry.cost * samples
        # An answer that went on from its scoring has paid for the prefill already.
        cost = answer + (0.0 if continued else self._scoring(decision))
        return Reply(
            text=said_most(answers.texts),
            decision=decision,
            cost=cost,
            saved=self._strong(entry, answer / samples) - cost,
            unit=unit,
            used=used,
            texts=answers.texts,
            continued=continued,
        )

    def labels(self) -> float | None:
        """What the labels cost; None where that is not known in the router's unit."""
        unit = self._file.unit
        used = [Used.from_dict(dict(found)) for found in self._file.label_cost.values()]
        return sum(one.of(unit) for one in used) if all(one.known(unit) for one in used) else None

    def _strong(self, entry: ModelEntry, cost: float) -> float:
        """What the strongest model would have cost where this one has cost so much.

        Scaled by the averages of both, so that a long prompt is long for either.
        """
        strong = self._file.models[-1].cost
        return cost * strong / entry.cost if entry.cost > 0 else strong

    def _scoring(self, decision: Decision) -> float:
        return 0.0 if decision.gain is None else self._file.scorer.cost
