"""What `pliant prune --adapters` notes beside a pruning, so that the same command goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pliant.structure import Plan

ABOUT_THE_REST = {
    "out",
    "adapters",
    "report",
    "zeros",
    "recover",
    "set",
    "report_to",
    "device",
    "json",
}
"""Options on which the pruning does not depend."""


def notes(options: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    return {"command": _command(options), "plan": plan.as_dict()}


def plan_of(folder: Path, options: Mapping[str, Any]) -> Plan | None:
    """The plan of the pruning in this folder, if a command with the same options made it."""
    from pliant.structure import Plan
    from pliant.structure.pruning.pruned import NOTES

    try:
        content = json.loads((folder.expanduser() / NOTES).read_bytes())
        same = _command(content["command"]) == _command(options)
        return Plan.from_dict(content["plan"]) if same else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _command(options: Mapping[str, Any]) -> dict[str, Any]:
    own = {k: v for k, v in options.items() if k not in ABOUT_THE_REST and v is not None}
    return dict(json.loads(json.dumps(own)))
