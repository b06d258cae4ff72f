"""What nano's programs report progress to; `pliant.cli.terminal.progress` draws it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

Report = Callable[[int, str], None]
"""Takes how many are done, and a message such as `loss 1.30`."""
Progress = Callable[[str, int, int], AbstractContextManager[Report]]
"""Takes a title, the total, and after how many a pipe gets a line."""


@contextmanager
def no_progress(title: str, total: int, every: int) -> Iterator[Report]:
    yield lambda done, message: None
