"""Ctrl-C during a training: the step is finished and a checkpoint saved, then it is passed on."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import Trainer, TrainerCallback


@contextmanager
def finishing_the_step(trainer: Trainer) -> Iterator[None]:
    """The first Ctrl-C waits for the step's end; a second one interrupts at once.

    Only the main thread is sent signals; elsewhere this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    stopper = _Stopper()
    before = signal.signal(signal.SIGINT, stopper.note)
    trainer.add_callback(stopper)
    try:
        yield
    finally:
        trainer.remove_callback(stopper)
        signal.signal(signal.SIGINT, before)
    if stopper.asked:
        raise KeyboardInterrupt


class _Stopper(TrainerCallback):
    def __init__(self) -> None:
        self.asked = False
        self.stepping = False

    def note(self, *_: Any) -> None:
        if self.asked or not self.stepping:
            raise KeyboardInterrupt
        self.asked = True

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.stepping = True

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.asked:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.stepping = False
