"""A call that hangs ends in time, and nothing else changes."""

from __future__ import annotations

import contextlib
import re
import signal
import threading
from collections.abc import Callable

import pytest

from pliant.verify.time_limit import TimedOut, call_within


def loop() -> None:
    while True:
        pass


def stubborn_loop() -> None:
    while True:
        with contextlib.suppress(Exception):
            loop()


def wait() -> None:
    threading.Event().wait()


def backtrack() -> None:
    re.match("(a+)+$", "a" * 60 + "!")


@pytest.mark.parametrize("hang", [loop, stubborn_loop, wait, backtrack])
def test_what_hangs_is_interrupted(hang: Callable[[], None]) -> None:
    with pytest.raises(TimedOut):
        call_within(0.05, hang)


@pytest.mark.parametrize("hang", [loop, wait])
def test_what_hangs_on_another_thread_is_abandoned(hang: Callable[[], None]) -> None:
    assert elsewhere(lambda: call_within(0.05, hang)) == "TimedOut"


def test_a_loop_that_is_abandoned_ends() -> None:
    """It would slow down everything that comes after it."""
    loops: list[threading.Thread] = []

    def hang() -> None:
        loops.append(threading.current_thread())
        loop()

    assert elsewhere(lambda: call_within(0.05, hang)) == "TimedOut"
    loops[0].join(60)
    assert not loops[0].is_alive()


def test_values_and_errors_pass() -> None:
    assert call_within(60, divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        call_within(60, divmod, 7, 0)
    assert elsewhere(lambda: call_within(60, divmod, 7, 2)) == (3, 1)
    assert elsewhere(lambda: call_within(60, divmod, 7, 0)) == "ZeroDivisionError"


def test_an_alarm_of_the_caller_still_comes() -> None:
    came: list[int] = []
    handler = signal.signal(signal.SIGALRM, lambda *_: came.append(1))
    others = signal.setitimer(signal.ITIMER_REAL, 100)
    try:
        call_within(60, len, "")
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 100
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        with pytest.raises(TimedOut):
            call_within(0.05, wait)
        while not came:  # overdue, it comes at once
            threading.Event().wait(0.01)
    finally:
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *others)


def elsewhere(call: Callable[[], object]) -> object:
    """What a call on another thread returns, or the name of what it raises."""
    outcomes: list[object] = []

    def work() -> None:
        try:
            outcomes.append(call())
        except BaseException as error:
            outcomes.append(type(error).__name__)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return outcomes[0]
