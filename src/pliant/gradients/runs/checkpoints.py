"""Which checkpoint of a run is whole: one that a kill tore is never taken for one.

A checkpoint is many files, written one after the other. The last of them says which there are and
how large; a folder without it, or with a file missing or of another size, is torn.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pliant.adapters.files import write_file

MARK = "complete.json"
NAME = re.compile(r"checkpoint-(\d+)")


class MarkComplete(TrainerCallback):
    """Ends each checkpoint; it comes last, after all that others write beside it."""

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if args.should_save:
            mark(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")


def mark(checkpoint: Path) -> None:
    """Say that all which is there now is all that there is."""
    (checkpoint / MARK).unlink(missing_ok=True)
    content = json.dumps({"files": _sizes(checkpoint)}, indent=1).encode()
    write_file(checkpoint / MARK, content)


def last_complete(folder: Path) -> Path | None:
    """The last checkpoint that can be resumed from."""
    return next((path for path in reversed(checkpoints(folder)) if is_complete(path)), None)


def is_complete(checkpoint: Path) -> bool:
    try:
        said = json.loads((checkpoint / MARK).read_bytes())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    found = _sizes(checkpoint)
    return isinstance(said, dict) and all(found.get(name) == size for name, size in said.items())


def clear_torn(folder: Path) -> list[str]:
    """Remove the checkpoints that are torn, and say which they were."""
    torn = [path for path in checkpoints(folder) if not is_complete(path)]
    for path in torn:
        shutil.rmtree(path)
    return [path.name for path in torn]


def checkpoints(folder: Path) -> list[Path]:
    """By their step."""
    found = [(NAME.fullmatch(path.name), path) for path in folder.glob("checkpoint-*")]
    return [path for _, path in sorted((int(m[1]), p) for m, p in found if m and p.is_dir())]


def _sizes(checkpoint: Path) -> dict[str, int]:
    files = (path for path in checkpoint.rglob("*") if path.is_file() and path.name != MARK)
    return {str(path.relative_to(checkpoint)): path.stat().st_size for path in files}
