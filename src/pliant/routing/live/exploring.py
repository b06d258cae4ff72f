"""Exploring: of the novel prompts, some are asked of every model, so that a router can learn.

The user gets the answer that the router would have returned anyway. The answers of the other models
are stored with their costs; a grade for each makes the prompt a label (`grades`). Whatever fails
here fails alone: the reply stands.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pliant.errors import PliantError
from pliant.routing.backends import Settings
from pliant.routing.live.asking import Asking
from pliant.routing.live.decision import Costing, Decision, Reply, most_frequent
from pliant.routing.live.ledger import Ledger
from pliant.routing.live.preference import Call
from pliant.routing.prompts import Prompt, text_of
from pliant.routing.router_file import RouterFile
from pliant.verify import Function

Verify = Callable[..., float]
"""How right an answer is, from 0 to 1, given the answer, its reference (None where there is none)
and the prompt, or the first one or two of them."""


class GradeWarning(UserWarning):
    """An answer could not be graded; the reply is not affected."""


class Explorer:
    """Asks the models that did not answer, and grades what was answered."""

    def __init__(
        self,
        file: RouterFile,
        asking: Asking,
        costing: Costing,
        ledger: Ledger,
        grader: Verify | None,
    ) -> None:
        self._share, self._asking, self._costing = file.explore.share, asking, costing
        self._ledger = ledger
        self._grader = None if grader is None else Function(grader)

    def is_due(self, decision: Decision, prompt: Prompt) -> bool:
        """Whether to ask every model: for some of the novel prompts, each time for the same."""
        return decision.novel and self._ledger.draw(prompt) < self._share

    def explore(
        self, row: int, call: Call, reply: Reply, others: Sequence[str], settings: Settings
    ) -> dict[str, str]:
        """Ask the other models and store all answers; returns the texts by model."""
        answered, failures = self._asking.each(call.prompt, others, settings)
        costs = {name: self._costing.of_answer(name, a) for name, a in answered.items()}
        texts = {name: most_frequent(answers.texts) for name, answers in answered.items()}
        stored = {name: (texts[name], costs[name]) for name in texts}
        stored[reply.model] = (reply.text, reply.answer_cost)
        self._ledger.grades.explored(row, call.prompt, call.group, stored, failures)
        return texts

    def grade(
        self,
        row: int,
        prompt: Prompt,
        texts: Mapping[str, str],
        verifier: Function | None,
        reference: Any,
    ) -> None:
        """Grade the texts of these models by the caller's verifier, else by the router's."""
        verifier = verifier or self._grader
        if verifier is None:
            return
        for model, text in texts.items():
            try:
                right = verifier(text, reference, text_of(prompt))
                self._ledger.grades.grade(row, right, model)
            except PliantError as error:
                warnings.warn(f"{model}: not graded ({error})", GradeWarning, stacklevel=3)
