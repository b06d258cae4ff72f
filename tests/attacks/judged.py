"""What a command must never do, whatever it is given, and a tally of what it did."""

from __future__ import annotations

import re
import signal
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from tests.attacks.worker import Done

INTERRUPTED = 130
FINE = (0, 2)
"""Exit codes: success, an error that the user can fix. A command has to end by itself."""
OF_PYTHON = re.compile(
    r"positional argument|has no attribute|unexpected keyword|'NoneType' object|"
    r"object is not (?:iterable|a mapping|callable|subscriptable)|list index out of range|"
    r"a bug in Pliant|Traceback \(most recent"
)
"""What a programmer would have to explain to a user."""
PROGRESS = re.compile(r": \d+ of \d|: \d+/\d|, step \d+ of \d|about a minute on two cores")
"""A line of progress on stderr, or the first of `pliant demo`."""
NOT_FINITE = re.compile(r"\b(?:nan|inf|infinity)\b", re.IGNORECASE)


def fault(done: Done, harmed: Iterable[str] = (), *, may_work: bool = False) -> str | None:
    """What was wrong with the end of a command, in a few words.

    A command that had to be interrupted hangs, unless it `may_work` for long and shows that it
    does: options may ask for a training of hours, and one that has reported progress and ends on
    Ctrl-C is right. One that waits, or loops before its first step, reports nothing.
    """
    if lost := list(harmed):
        return f"changed {', '.join(lost[:3])}"
    if done.code == -signal.SIGKILL:
        return "hangs"
    if done.code < 0:
        return f"ended by {signal.Signals(-done.code).name}"
    if done.interrupted and not (may_work and PROGRESS.search(done.stderr)):
        return f"ended by Ctrl-C alone: {_last_line(done.stderr)}"
    if done.code not in FINE and not (done.interrupted and done.code == INTERRUPTED):
        return f"exit {done.code}: {_last_line(done.stderr)}"
    if match := OF_PYTHON.search(done.stderr):
        return f"exit {done.code}, and says {match[0]!r}: {_last_line(done.stderr)}"
    if done.code == 2 and not done.stderr.strip():
        return "exit 2 without a word"
    return None


def not_finite(done: Done) -> str | None:
    """A result that is no number, in what a command prints as its success."""
    match = NOT_FINITE.search(done.stdout) if done.code == 0 else None
    return f"exit 0, and prints {match[0]}" if match else None


def not_right(done: Done) -> str | None:
    """Why a command that must succeed did not."""
    return None if done.code == 0 else f"exit {done.code}: {_last_line(done.stderr)}"


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
    interrupted: list[str] = field(default_factory=list)
    """Those that did not end within their limit, right or wrong."""

    def add(self, what: object, problem: str | None, done: Done | None = None) -> None:
        self.tried += 1
        if done is not None:
            self.codes[done.code] += 1
            self.interrupted += [str(what)] * done.interrupted
        if problem is not None:
            self.wrong.append(f"{what}\n    {problem}")

    @property
    def right(self) -> int:
        return self.tried - len(self.wrong)
