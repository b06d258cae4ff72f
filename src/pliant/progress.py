"""Progress in a pipe: which steps of long work print a line, and how long it will still take.

pace = Pace(total=1000)
for done in range(1, 1001):
    ...
    if pace.due(done):
        print(f"training: {done} of 1000{pace.left(done)}")  # about ten lines
"""

from __future__ import annotations

import time
from collections.abc import Callable

LINES = 10


class Pace:
    """The first step prints a line, and each that completes another of `lines` equal shares."""

    def __init__(
        self,
        total: int,
        lines: int = LINES,
        begun: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.total, self.lines, self.begun, self.clock = max(1, total), lines, begun, clock
        self.start = clock()
        self.printed = -1
        """Shares at the last line."""

    def due(self, done: int) -> bool:
        """Whether to print a line now; asked once for each step."""
        shares = done * self.lines // self.total
        if shares <= self.printed:
            return False
        self.printed = shares
        return True

    def left(self, done: int) -> str:
        """The end of a line: how long the rest will take, if anything is known of that."""
        steps = done - self.begun
        seconds = self.clock() - self.start
        if done >= self.total:
            return f", took {duration(seconds)}"
        return f", about {duration(seconds / steps * (self.total - done))} left" if steps else ""


def duration(seconds: float) -> str:
    """`4 s`, `12 min`, `3 h 20 min`."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    hours, rest = divmod(minutes, 60)
    return f"{minutes} min" if minutes < 100 else f"{hours} h {rest} min"
