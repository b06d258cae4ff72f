"""Which model should answer a prompt: labels, scorers, thresholds, the router, and what it saves.

In order: `backends` answer prompts, `labels` records which models were right, `scorers` learn to
predict that, `metrics` measures how well, `goals` turns a goal in words into a threshold, `fitting`
combines all of it, and `live` serves `router`. `outcomes` is the table of labels, `decision_rule`
the one rule for which model answers.

Names are imported when they are first used, so that parts without a model import no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pliant.routing.goals.goal import Goal as Goal
    from pliant.routing.goals.thresholds import Threshold as Threshold
    from pliant.routing.learning import learn as learn
    from pliant.routing.live.decision import Decision as Decision
    from pliant.routing.live.decision import Reply as Reply
    from pliant.routing.outcomes import Outcomes as Outcomes
    from pliant.routing.router import Router as Router

_HOME_OF = {
    "Decision": "live.decision",
    "Goal": "goals.goal",
    "Outcomes": "outcomes",
    "Reply": "live.decision",
    "Router": "router",
    "Threshold": "goals.thresholds",
    "learn": "learning",
}

__all__ = list(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'pliant.routing' has no attribute {name!r}")
    value = getattr(import_module(f"pliant.routing.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value
