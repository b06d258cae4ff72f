"""Which model a conversation is with: sessions, remembered for a while and not for ever."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Kept:
    """What a session keeps: its model, and how hard its last scored prompt was."""

    model: str
    score: float | None


class Sessions:
    """At most `limit` sessions, each for `ttl` seconds after it was last used; thread-safe."""

    def __init__(self, limit: int, ttl: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit, self._ttl, self._clock = limit, ttl, clock
        self._kept: OrderedDict[str, tuple[float, Kept]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, session: str) -> Kept | None:
        with self._lock:
            self._forget()
            found = self._kept.pop(session, None)
            if found is None:
                return None
            self._kept[session] = (self._clock(), found[1])
            return found[1]

    def put(self, session: str, kept: Kept) -> None:
        with self._lock:
            self._kept.pop(session, None)
            self._kept[session] = (self._clock(), kept)
            self._forget()

    def __len__(self) -> int:
        with self._lock:
            self._forget()
            return len(self._kept)

    def _forget(self) -> None:
        """The longest unused stand first."""
        oldest = self._clock() - self._ttl
        while self._kept:
            used, _ = next(iter(self._kept.values()))
            if used > oldest and len(self._kept) <= self._limit:
                break
            self._kept.popitem(last=False)
