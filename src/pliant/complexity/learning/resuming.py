"""Which checkpoint a training goes on from: the last that is whole.

A kill while one is written leaves a folder with some of its files; the Trainer's own state is
written last, so a checkpoint that has it has all.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pliant.errors import InvalidInput

LAST_WRITTEN = "trainer_state.json"


def last_whole(folder: str | Path) -> str | None:
    """The latest checkpoint in a run's folder that was written to its end."""
    found = [path for path in Path(folder).glob("checkpoint-*") if _step(path) >= 0]
    whole = [path for path in found if _is_whole(path)]
    return str(max(whole, key=_step)) if whole else None


def resumed(asked: Any, folder: str | Path) -> Any:
    """What `resume_from_checkpoint=True` means; a folder that is named stays as it is."""
    if asked is not True:
        return asked
    if (found := last_whole(folder)) is None:
        raise InvalidInput(f"{folder}: holds no whole checkpoint to go on from")
    return found


def _step(path: Path) -> int:
    number = path.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def _is_whole(path: Path) -> bool:
    try:
        json.loads((path / LAST_WRITTEN).read_bytes())
    except (OSError, ValueError):
        return False
    return True
