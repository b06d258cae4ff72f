"""Trying again: which failures are worth it, and how long to wait before the next try."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC
from email.utils import parsedate_to_datetime

from pliant.errors import InvalidInput


@dataclass(frozen=True)
class Retry:
    """Waits that double from `first` to `most` seconds, each drawn from its upper half.

    The draw keeps many callers from coming back in step. What a server asks for by Retry-After is
    waited for, at least, up to `patience`; a server that asks for more is not waited for at all.
    """

    tries: int = 6
    first: float = 0.5
    most: float = 30.0
    patience: float = 300.0
    draw: Callable[[], float] = field(default=random.random, repr=False)
    now: Callable[[], float] = field(default=time.time, repr=False)

    def __post_init__(self) -> None:
        if self.tries < 1 or self.first < 0 or self.most < self.first:
            raise InvalidInput(f"{self}: at least one try, and waits that do not shrink, are due")

    def wait(self, tried: int, retry_after: str | None = None) -> float | None:
        """Seconds before the next try after `tried` of them; None: do not try again."""
        if tried >= self.tries:
            return None
        whole = min(self.most, self.first * 2 ** (tried - 1))
        own = whole / 2 + self.draw() * whole / 2
        asked = seconds_from(retry_after, self.now())
        if asked is None:
            return own
        return None if asked > self.patience else max(own, asked)


def seconds_from(retry_after: str | None, now: float) -> float | None:
    """The header's seconds, which it states as a number or as a date; None where it is neither."""
    if retry_after is None:
        return None
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        pass
    try:
        date = parsedate_to_datetime(retry_after)
    except ValueError:
        return None
    date = date if date.tzinfo else date.replace(tzinfo=UTC)
    return max(0.0, date.timestamp() - now)
