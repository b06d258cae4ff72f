"""What a router decides, why, and the reply that it gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pliant.routing.backends import Used


@dataclass(frozen=True)
class Decision:
    """Which model answers a prompt, and why."""

    model: str
    score: float | None
    """The probability that the cheapest model fails; None where the scorer was not used."""
    gain: float | None
    """How much more often the strongest model is expected to be right than the cheapest."""
    reason: str
    wanted: str
    """The preferred model, if it had been up and the prompt had fitted its context."""
    novel: bool = False
    """Whether the prompt is unlike those that the router was fitted on."""
    from_session: bool = False
    """Whether this is the session's model."""

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
    """Against the strongest model on the same prompt, by the ratio of their average costs."""
    unit: str
    used: Used
    texts: tuple[str, ...]
    """All samples; `text` is the most frequent one, the first of those."""
    continued: bool = False
    """Whether the answer continued from the prefill that scored the prompt."""

    @property
    def model(self) -> str:
        return self.decision.model

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "used": self.used.as_dict(), "model": self.model}


def most_frequent(texts: Sequence[str]) -> str:
    """The answer that most samples agree on, without regard to white space at both ends."""
    stripped = [text.strip() for text in texts]
    return texts[stripped.index(max(stripped, key=stripped.count))]
