"""Call a function that may hang, with a time limit."""

from __future__ import annotations

import ctypes
import signal
import threading
from collections.abc import Callable
from typing import Any, TypeVar

Value = TypeVar("Value")


class TimedOut(BaseException):
    """The function had not returned when its time was over.

    It is no Exception, so that a function which catches those does not catch it.
    """


def call_within(seconds: float, function: Callable[..., Value], *arguments: Any) -> Value:
    """What the function returns, or TimedOut.

    On the main thread an alarm interrupts the function: loops of Python, sleeping, waiting for a
    server, and a regular expression that backtracks without end. It runs where it is called, so
    that it may use a model, a GPU or a closure, which a process of its own would not have. On
    another thread, where no alarm comes, it runs in a thread that is abandoned when the time is
    over. What neither can interrupt is a C extension that never looks for signals.
    """
    if hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread():
        return _with_alarm(seconds, function, *arguments)
    return _in_thread(seconds, function, *arguments)


def _with_alarm(seconds: float, function: Callable[..., Value], *arguments: Any) -> Value:
    previous = signal.signal(signal.SIGALRM, _raise)
    waiting, interval = 0.0, 0.0
    try:
        try:
            waiting, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
            return function(*arguments)
        finally:
            left, _ = signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        # An alarm of our own that is still pending is raised here, before the handler is gone.
        signal.signal(signal.SIGALRM, previous if previous is not None else signal.SIG_DFL)
        if waiting:  # somebody else's alarm goes on, and comes at once if it is overdue
            signal.setitimer(signal.ITIMER_REAL, max(waiting - (seconds - left), 1e-3), interval)


def _raise(*_: Any) -> None:
    raise TimedOut


def _in_thread(seconds: float, function: Callable[..., Value], *arguments: Any) -> Value:
    values: list[Value] = []
    errors: list[BaseException] = []
    done = threading.Event()

    def work() -> None:
        try:
            values.append(function(*arguments))
        except BaseException as error:
            errors.append(error)
        done.set()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    if not done.wait(seconds):
        # A loop of Python ends with this; what waits in C ends when it returns to Python.
        ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(thread.ident or 0), ctypes.py_object(TimedOut)
        )
        raise TimedOut
    if errors:
        raise errors[0]
    return values[0]
