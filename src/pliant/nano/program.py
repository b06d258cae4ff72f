"""What `nano.train` and `nano.evaluate` share as programs: errors in one line, and progress."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from pliant.errors import PliantError

Tell = Callable[[int, str], None]


class Parser(argparse.ArgumentParser):
    """argparse, with one line for a wrong argument as everywhere in Pliant."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


@contextmanager
def as_program(after_an_interrupt: str) -> Iterator[None]:
    """Runs a block: what a user can mend ends it with one line and 2, Ctrl-C with one and 130."""
    from safetensors import SafetensorError  # what it raises for a full disk, too
    from transformers.utils import logging

    logging.disable_progress_bar()  # over files of kilobytes
    try:
        yield
    except KeyboardInterrupt:
        print(f"interrupted; {after_an_interrupt}", file=sys.stderr)
        sys.exit(130)
    except (PliantError, OSError, SafetensorError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


@contextmanager
def progress(what: str, total: int, every: int = 1) -> Iterator[Tell]:
    """Yields what is to be told how much is done and how it goes: `tell(12, "loss 1.30")`.

    On a terminal that moves a bar; in a pipe it prints a line whenever `every` more are done.
    Both go to stderr: stdout is for results.
    """
    if sys.stderr.isatty():
        with _bar(what, total) as tell:
            yield tell
    else:
        yield _lines(what, total, every)


def _lines(what: str, total: int, every: int) -> Tell:
    def tell(done: int, said: str) -> None:
        if done % every == 0 or done == total:
            print(f"{what}: {done}/{total} {said}".rstrip(), file=sys.stderr, flush=True)

    return tell


@contextmanager
def _bar(what: str, total: int) -> Iterator[Tell]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[said]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total, said="")
        yield lambda done, said: bar.update(task, completed=done, said=said)
