"""Who should answer this prompt: labels, scorers, thresholds, the router, and what it saves.

The names are found when they are first used, so that a part that needs no model imports none.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pliant.routing.decision import Decision as Decision
    from pliant.routing.decision import Reply as Reply
    from pliant.routing.goals import Goal as Goal
    from pliant.routing.outcomes import Outcomes as Outcomes
    from pliant.routing.router import Router as Router
    from pliant.routing.thresholds import Threshold as Threshold

_HOME_OF = {
    "Decision": "decision",
    "Goal": "goals",
    "Outcomes": "outcomes",
    "Reply": "decision",
    "Router": "router",
    "Threshold": "thresholds",
}

__all__ = list(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'pliant.routing' has no attribute {name!r}")
    value = getattr(import_module(f"pliant.routing.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value
