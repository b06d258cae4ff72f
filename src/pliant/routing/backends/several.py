"""Several calls at a time, by threads that nobody has to wait for."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def several(
    work: Callable[[Item], Result], items: Sequence[Item], at_once: int
) -> Generator[tuple[int, Result], None, None]:
    """Each item's number with what `work` made of it, as they are done.

    Whoever stops listening waits for nothing: what has not begun does not begin, and what is under
    way (a call to a server that stalls) ends when it ends, and ends with the process at the latest.
    """
    waiting = iter(range(len(items)))
    taking = threading.Lock()
    done: queue.SimpleQueue[tuple[int, Result | None, BaseException | None]] = queue.SimpleQueue()
    stopped = threading.Event()

    def worker() -> None:
        while not stopped.is_set():
            with taking:
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
