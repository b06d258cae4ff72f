"""What a command must never do, whatever it is given, and a tally of what it did."""

from __future__ import annotations

import re
import signal
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from tests.attacks.worker import Done

FINE = (0, 2, 130)
"""Exit codes: success, an error that the user can fix, interrupted."""
OF_PYTHON = re.compile(
    r"positional argument|has no attribute|unexpected keyword|'NoneType' object|"
    r"object is not (?:iterable|a mapping|callable|subscriptable)|list index out of range|"
    r"a bug in Pliant|Traceback \(most recent"
)
"""What a programmer would have to explain to a user."""


def fault(done: Done, harmed: Iterable[str] = ()) -> str | None:
    """What was wrong with the end of a command, in a few words."""
    if lost := list(harmed):
        return f"changed {', '.join(lost[:3])}"
    if done.code == -signal.SIGKILL:
        return "hangs"
    if done.code < 0:
        return f"ended by {signal.Signals(-done.code).name}"
    if done.code not in FINE:
        return f"exit {done.code}: {_last_line(done.stderr)}"
    if match := OF_PYTHON.search(done.stderr):
        return f"exit {done.code}, and says {match[0]!r}: {_last_line(done.stderr)}"
    if done.code == 2 and not done.stderr.strip():
        return "exit 2 without a word"
    return None


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1][:300] if lines else ""


@dataclass
class Tally:
    """How many of a kind were tried, and which were wrong."""

    kind: str
    tried: int = 0
    wrong: list[str] = field(default_factory=list)
    codes: Counter[int] = field(default_factory=Counter)

    def add(self, what: object, problem: str | None, code: int | None = None) -> None:
        self.tried += 1
        if code is not None:
            self.codes[code] += 1
        if problem is not None:
            self.wrong.append(f"{what}\n    {problem}")

    @property
    def right(self) -> int:
        return self.tried - len(self.wrong)
