"""A run at a terminal: what it shows while it trains, and how Ctrl-C stops it.

It shows a bar on a terminal, and some ten lines in a pipe, with the time left. Ctrl-C lets the
Trainer finish its step and save a checkpoint.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pliant.progress import Pace

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

Say = Callable[[str], None]
Describe = Callable[[Mapping[str, Any]], str]
"""What a part adds to the line of a log."""


def print_to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class ProgressReport(TrainerCallback):
    """Shows steps and losses, and has the last step logged even between two logs."""

    def __init__(self, say: Say, describe: Describe = lambda logs: "") -> None:
        self.say, self.describe = say, describe
        self.bar: Progress | None = None
        self.task: TaskID | None = None
        self.paces: dict[str, Pace] = {}
        """Of the lines of losses, and of those of evaluations."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        pace = partial(Pace, state.max_steps, begun=state.global_step)
        self.paces = {"loss": pace(), "eval_loss": pace()}
        if not state.is_world_process_zero or not sys.stderr.isatty():
            return
        from rich.console import Console
        from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

        columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self.task = self.bar.add_task("training", total=state.max_steps)
        self.bar.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=state.global_step)
        if state.global_step >= state.max_steps:
            control.should_log = True

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any
    ) -> None:
        logs = event["logs"]
        if not state.is_world_process_zero or not logs.keys() & {"loss", "eval_loss"}:
            return
        if self.bar is not None and self.task is not None and "loss" in logs:
            text = f"training, loss {logs['loss']:.4f}{self.describe(logs)}"
            self.bar.update(self.task, description=text)
            return
        kind, done = "loss" if "loss" in logs else "eval_loss", state.global_step
        pace = self.paces.get(kind)
        if pace is not None and not pace.due(done):
            return
        if kind == "eval_loss":
            self.say(f"step {done}: evaluation loss {logs['eval_loss']:.4f}")
            return
        left = "" if pace is None else pace.left(done)
        text = f"loss {logs['loss']:.4f}{self.describe(logs)}"
        self.say(f"training, step {done} of {state.max_steps}: {text}{left}")


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
