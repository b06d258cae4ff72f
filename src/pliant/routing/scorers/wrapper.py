"""A scorer around another one, whose predictions it changes: novelty flags, and corrections."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import Any, Self

from pliant.routing.outcomes import Outcomes
from pliant.routing.prompts import Prompt
from pliant.routing.scorers.protocol import (
    Groups,
    Predictions,
    Prefilling,
    Prompts,
    Scorer,
)


class Wrapper(Scorer):
    """Fits, predicts and costs as the scorer inside it, and has that one's kind."""

    kind = "wrapper"

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer
        self.kind = scorer.kind  # type: ignore[misc]
        self.needs_groups = scorer.needs_groups  # type: ignore[misc]

    @abstractmethod
    def change(self, prompts: Prompts, predictions: Predictions) -> Predictions:
        """What becomes of the inner scorer's predictions of these prompts."""

    def fit(self, train: Outcomes, choice: Outcomes | None = None, seed: int = 0) -> Self:
        self.scorer.fit(train, choice, seed)
        return self

    def predict(self, prompts: Prompts, groups: Groups = None) -> Predictions:
        return self.change(prompts, self.scorer.predict(prompts, groups))

    def while_answering(self, prompt: Prompt) -> Prefilling | None:
        """The inner scorer's offer, if it reads a model that answers."""
        offer = getattr(self.scorer, "while_answering", None)
        inner: Prefilling | None = None if offer is None else offer(prompt)
        if inner is None:
            return None
        predictions = inner.predictions
        return replace(inner, predictions=lambda scores: self.change([prompt], predictions(scores)))

    @property
    def kinds(self) -> tuple[str, ...]:
        return self.scorer.kinds

    def flops(self, prompts: Prompts) -> float:
        return self.scorer.flops(prompts)

    def chosen(self) -> dict[str, Any]:
        return self.scorer.chosen()
