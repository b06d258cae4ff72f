"""Output: results on stdout, progress and errors on stderr, plain lines in a pipe."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from pliant.errors import InvalidInput
from pliant.options import unusable
from pliant.progress import Pace

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, ProgressColumn

    from pliant.reports.page import Coloured
    from pliant.reports.tables import Table

Item = TypeVar("Item")
FEW = 5
"""Lines of one piece of work in a pipe: several of them may follow each other."""
Report = Callable[[int, str], None]


def console(stderr: bool = False) -> Console:
    """A rich console: colours on a terminal (unless NO_COLOR is set), plain text in a pipe."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False)


def print_json(result: Any) -> None:
    """Print one JSON document; NaN and infinity, which JSON lacks, are errors."""
    print(json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False))


def print_text(sentence: str) -> None:
    """A sentence on stdout: wrapped on a terminal, one line in a pipe."""
    where = console()
    where.print(sentence, markup=False, soft_wrap=not where.is_terminal)


def print_heading(heading: str) -> None:
    """A heading on stdout, underlined, with a blank line after it; bold on a terminal."""
    from rich.text import Text

    console().print(Text(f"{heading}\n{'=' * len(heading)}\n", style="bold"), soft_wrap=True)


def draw(
    tables: Iterable[Table], sentences: Iterable[str] = (), texts: Iterable[Coloured] = ()
) -> None:
    """Print a result: its tables, what they mean, and coloured texts."""
    where = console()
    for table in tables:
        table.draw(where)
    for sentence in sentences:
        print_text(sentence)
    for text in texts:
        text.draw(where)


def read_stdin() -> str:
    """All of stdin, which must be UTF-8."""
    try:
        text = sys.stdin.read()
    except UnicodeDecodeError as error:
        raise InvalidInput(f"stdin is not text in UTF-8 ({error.reason})") from None
    if unusable(text):  # in another locale, what is not text comes as lone surrogates
        raise InvalidInput(f"stdin {unusable(text)}")
    return text


def complain(message: str) -> None:
    """Print an error on stderr as one line."""
    from rich.text import Text

    line = Text("error: ", style="bold red") + Text(" ".join(message.split()), style="default")
    console(stderr=True).print(line, soft_wrap=True)


@contextmanager
def shown_warnings(*kinds: type[Warning]) -> Iterator[None]:
    """Print each warning of these kinds once, as one line on stderr."""
    with warnings.catch_warnings():
        for kind in kinds:
            warnings.simplefilter("always", kind)
        original, printed = warnings.showwarning, set[str]()

        def show(message: Any, category: type[Warning], *rest: Any, **others: Any) -> None:
            if not issubclass(category, kinds):
                original(message, category, *rest, **others)
            elif str(message) not in printed:
                printed.add(str(message))
                print(f"warning: {message}", file=sys.stderr, flush=True)

        warnings.showwarning = show
        yield


def track(items: Iterable[Item], what: str, total: int | None = None) -> Iterator[Item]:
    """Iterate with a progress bar on a terminal, or some lines in a pipe, with the time left.

    The total of what has no length must be given.
    """
    if total is None:
        assert isinstance(items, Sized)
        total = len(items)
    if sys.stderr.isatty():
        from rich.progress import track as bar

        where = console(stderr=True)
        yield from bar(items, description=what, total=total, console=where, transient=True)
        return
    pace = Pace(total, FEW)
    for done, item in enumerate(items, start=1):
        yield item
        if pace.due(done):
            print(f"{what}: {done} of {total}{pace.left(done)}", file=sys.stderr, flush=True)


@contextmanager
def progress(title: str, total: int, every: int = 0, lines: int = FEW) -> Iterator[Report]:
    """Yields a function that takes how many are done and a message: `report(12, "loss 1.30")`.

    On a terminal it moves a bar; in a pipe it prints some lines with the time left, or one whenever
    `every` more are done.
    """
    pace = Pace(total, lines)

    def print_line(done: int, message: str) -> None:
        due = done % every == 0 or done == total if every else pace.due(done)
        if due:
            left = "" if every else pace.left(done)
            text = f"{title}: {done}/{total} {message}".rstrip() + left
            print(text, file=sys.stderr, flush=True)

    if not sys.stderr.isatty():
        yield print_line
        return
    from rich import progress as rich

    messages, elapsed = rich.TextColumn("{task.fields[message]}"), rich.TimeElapsedColumn()
    with _bar(rich.MofNCompleteColumn(), messages, elapsed, rich.TimeRemainingColumn()) as bar:
        task = bar.add_task(title, total=total, message="")
        yield lambda done, message: bar.update(task, completed=done, message=message)


class Bar:
    """Opens a progress bar when the first step reports how many there are."""

    def __init__(self, title: str, lines: int = FEW) -> None:
        self.title, self.lines = title, lines
        self.opened: Any = None
        self.report: Report | None = None

    def __enter__(self) -> Bar:
        return self

    def __call__(self, done: int, total: int) -> None:
        if self.report is None:
            self.opened = progress(self.title, total, lines=self.lines)
            self.report = self.opened.__enter__()
        self.report(done, "")

    def __exit__(self, *error: Any) -> None:
        if self.opened is not None:
            self.opened.__exit__(*error)


class Stages:
    """A bar for each thing that is done, one after the other: `stages("pruning", 3, 30)`.

    In a pipe, each prints a line as it begins, and so many `lines` as it goes on. The more there
    are, the fewer of them do: of a hundred, a dozen.
    """

    def __init__(self, lines: int = 0) -> None:
        self.lines = lines
        self.bar: Bar | None = None
        self.what, self.done, self.count = "", 0, 0

    def __enter__(self) -> Stages:
        return self

    def __call__(self, what: str, done: int, total: int) -> None:
        if what != self.what or done < self.done:
            self.__exit__(None, None, None)
            self.count += 1
            self.what = what
            if sys.stderr.isatty() or _is_round(self.count):
                self.bar = Bar(what, self.lines)
        self.done = done
        if self.bar is not None:
            self.bar(done, total)

    def __exit__(self, *error: Any) -> None:
        if self.bar is not None:
            self.bar.__exit__(*error)
        self.bar = None


def _is_round(count: int) -> bool:
    """1, 2, 3, 4, 6, 8, 12, 16, 24, ...: a power of two, or one and a half times that."""
    while count > 3 and count % 2 == 0:
        count //= 2
    return count <= 3


@contextmanager
def transfers() -> Iterator[Callable[[str, int, int], None]]:
    """Yields a function that takes what is transferred, and how many bytes of how many are done.

    On a terminal it moves a bar with the speed; in a pipe it prints a line for every fifth.
    """
    printed: dict[str, int] = {}

    def print_line(what: str, done: int, total: int) -> None:
        fifths = done * 5 // total
        if fifths > printed.get(what, -1):
            printed[what] = fifths
            print(f"{what}: {done:,} of {total:,} bytes", file=sys.stderr, flush=True)

    if not sys.stderr.isatty():
        yield print_line
        return
    from rich import progress as rich

    columns = (rich.DownloadColumn(), rich.TransferSpeedColumn(), rich.TimeRemainingColumn())
    with _bar(*columns) as bar:
        tasks: dict[str, Any] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield report


def _bar(*columns: ProgressColumn) -> Progress:
    """Bars with their titles on the left and these columns on the right."""
    from rich.progress import BarColumn, Progress, TextColumn

    title = TextColumn("{task.description}")
    return Progress(title, BarColumn(), *columns, console=console(stderr=True))


def hush_libraries() -> None:
    """Silence the notices and progress bars of libraries, unless the user has set otherwise.

    By environment variables, for these must be set before the libraries are imported.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # lists kernels when imported
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")


def hide_loading_bars() -> None:
    """Hide the progress bars of loading a model: those of small ones are too short to be read."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def drop_output() -> None:
    """After a broken pipe: discard what the interpreter still flushes to stdout."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
