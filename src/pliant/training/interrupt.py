"""Ctrl-C during a training: the Trainer finishes its step and saves a checkpoint, then stops."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import Trainer, TrainerCallback


@contextmanager
def finish_step_on_interrupt(trainer: Trainer) -> Iterator[None]:
    """The first Ctrl-C waits for the end of the step, then raises KeyboardInterrupt; a second one
    interrupts at once.

    Does nothing outside the main thread, which alone receives signals, or where several processes
    train: they would save at different steps.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or trainer.args.world_size > 1:
        yield
        return
    stopper = _Stopper()
    handler = signal.signal(signal.SIGINT, stopper.interrupt)
    trainer.add_callback(stopper)
    try:
        yield
    finally:
        trainer.remove_callback(stopper)
        signal.signal(signal.SIGINT, handler)
    if stopper.interrupted:
        raise KeyboardInterrupt


class _Stopper(TrainerCallback):
    def __init__(self) -> None:
        self.interrupted = False
        self.stepping = False

    def interrupt(self, *_: Any) -> None:
        if self.interrupted or not self.stepping:
            raise KeyboardInterrupt
        self.interrupted = True

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.stepping = True

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.interrupted:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.stepping = False
