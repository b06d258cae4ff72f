"""Calls to a server: which failures to retry and when, and several calls at a time in threads."""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import TypeVar

from pliant.errors import InvalidInput

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_parallel(
    work: Callable[[Item], Result], items: Sequence[Item], at_once: int
) -> Generator[tuple[int, Result], None, None]:
    """Each item's index and result, in the order in which they finish.

    Closing the generator returns at once: no further item starts, and running ones (a call to a
    server that stalls) finish on their own, or end with the process.
    """
    waiting = iter(range(len(items)))
    next_lock = threading.Lock()
    done: queue.SimpleQueue[tuple[int, Result | None, BaseException | None]] = queue.SimpleQueue()
    stopped = threading.Event()

    def worker() -> None:
        while not stopped.is_set():
            with next_lock:
                i = next(waiting, None)
            if i is None:
                return
            try:
                done.put((i, work(items[i]), None))
            except BaseException as error:
                done.put((i, None, error))

    for _ in range(min(at_once, len(items))):
        threading.Thread(target=worker, daemon=True).start()
    try:
        for _ in items:
            i, result, error = done.get()
            if error is not None:
                raise error
            yield i, result  # type: ignore[misc]
    finally:
        stopped.set()


@dataclass(frozen=True)
class Retry:
    """Waits that double from `first` to `most` seconds, each drawn at random from its upper half.

    The random draw keeps many callers from retrying at the same time. A wait is at least as long as
    the server's Retry-After; if that is longer than `patience`, there is no further try.
    """

    tries: int = 6
    first: float = 0.5
    most: float = 30.0
    patience: float = 300.0
    draw: Callable[[], float] = field(default=random.random, repr=False)
    now: Callable[[], float] = field(default=time.time, repr=False)

    def __post_init__(self) -> None:
        if self.tries < 1 or self.first < 0 or self.most < self.first:
            raise InvalidInput(f"{self}: needs at least one try, and waits that do not shrink")

    def wait(self, tried: int, retry_after: str | None = None) -> float | None:
        """Seconds to wait after `tried` tries; None: do not try again."""
        if tried >= self.tries:
            return None
        longest = min(self.most, self.first * 2 ** (tried - 1))
        own = longest / 2 + self.draw() * longest / 2
        requested = seconds_from(retry_after, self.now())
        if requested is None:
            return own
        return None if requested > self.patience else max(own, requested)


def seconds_from(retry_after: str | None, now: float) -> float | None:
    """The seconds of a Retry-After header, a number or a date; None if it is neither."""
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
