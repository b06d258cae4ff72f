"""Who should answer this prompt: labels, scorers, thresholds, the router, and what it saves.

In their order: `backends` are asked, `labels` says who was right, `scorers` learn to foresee it,
`measures` says how well, `goals` makes a threshold of a wish in words, `fitting` puts all of it
together, and `live` is what `router` needs at work. `outcomes` is the table between them.

The names are found when they are first used, so that a part that needs no model imports none.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pliant.routing.goals.goal import Goal as Goal
    from pliant.routing.goals.thresholds import Threshold as Threshold
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
}

__all__ = list(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'pliant.routing' has no attribute {name!r}")
    value = getattr(import_module(f"pliant.routing.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value
