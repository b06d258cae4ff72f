"""How much the demo does: what fits into a minute, or all of it. No figure depends on the clock."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """The amounts of work of the chapters."""

    minutes: str
    """How long it takes on two cores, in words."""
    trained: int
    calibrated: int
    """Questions that a router is trained on, and others that choose its threshold."""
    race_steps: int
    """Each way of training gets the operations of so many standard steps."""
    race_points: int
    """Measurements on a curve of the race."""
    expert_steps: int
    known: int
    """Prompts of the kinds that nano-l knows, to fit the classifier of prompts on."""


SHORT = Size("a minute", 1_500, 700, race_steps=20, race_points=2, expert_steps=25, known=400)
FULL = Size("two minutes", 3_000, 2_000, race_steps=40, race_points=5, expert_steps=40, known=600)
