"""What `pliant prune --adapters` notes beside a pruning, so that the same command goes on."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pliant.cli.prune import PruneOptions
    from pliant.structure import Plan

ABOUT_THE_REST = {"out", "adapters", "report", "zeros", "recover", "set", "device", "json"}
"""Options on which the pruning does not depend."""


def notes(options: PruneOptions, plan: Plan) -> dict[str, Any]:
    return {"command": _command(options), "plan": plan.as_dict()}


def plan_of(options: PruneOptions) -> Plan | None:
    """The plan of the pruning in --adapters, if this very command made it and was interrupted.

    If it was not, or has nothing left to do, the folder is in use.
    """
    from pliant.structure import Plan
    from pliant.structure.pruning.pruned import NOTES

    if options.adapters is None or (options.out is None and options.report is None):
        return None
    try:
        content = json.loads((options.adapters.expanduser() / NOTES).read_bytes())
        same = content["command"] == _command(options)
        return Plan.from_dict(content["plan"]) if same else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _command(options: PruneOptions) -> dict[str, Any]:
    own = {k: v for k, v in asdict(options).items() if k not in ABOUT_THE_REST}
    return dict(json.loads(json.dumps(own)))
