"""What a run shows while it trains: a bar on a terminal, one line for each log in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Self

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
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
            self.bar.update(self.task, description=f"loss {logs['loss']:.4f}{self.describe(logs)}")
        elif "loss" in logs:
            step = f"step {state.global_step} of {state.max_steps}"
            self.say(f"{step}: loss {logs['loss']:.4f}{self.describe(logs)}")
        else:
            self.say(f"step {state.global_step}: evaluation loss {logs['eval_loss']:.4f}")
