"""What a router says: which model, how sure, and why; and what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pliant.routing.backends.costs import Used


@dataclass(frozen=True)
class Decision:
    """Which model answers a prompt, and why."""

    model: str
    score: float | None
    """The probability that the cheapest model fails; None where nobody asked the scorer."""
    gain: float | None
    """How much more often the strongest model is expected to be right than the cheapest."""
    reason: str
    wanted: str
    """The model that it would have been if all had been up and the prompt had fitted."""
    novel: bool = False
    """Whether the prompt is unlike those that the router was fitted on."""
    from_session: bool = False
    """Whether it is the session's model."""

    @property
    def fell_over(self) -> bool:
        return self.model != self.wanted

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Reply:
    """An answer, who gave it, and what it cost."""

    text: str
    decision: Decision
    cost: float
    """In the router's unit; by the labels' average where the answer's own is not known."""
    saved: float
    """Against the strongest model on the same prompt, by the ratio of their average costs."""
    unit: str
    used: Used
    texts: tuple[str, ...]
    """All samples; `text` is the one given most often, the first of those."""
    continued: bool = False
    """Whether the answer went on from the prefill that the prompt was scored in."""

    @property
    def model(self) -> str:
        return self.decision.model

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "used": self.used.as_dict(), "model": self.model}


def said_most(texts: Sequence[str]) -> str:
    """The answer that most samples agree on, white space at both ends aside."""
    stripped = [text.strip() for text in texts]
    winner = max(stripped, key=stripped.count)  # the first of the most frequent
    return texts[stripped.index(winner)]
