"""The attack: good and bad command lines, servers, keys, kills and forged files, in any number."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from tests.attacks import command_lines, forgeries, kills, servers
from tests.attacks.command_lines import CommandLine
from tests.attacks.judged import Tally, fault, not_right
from tests.attacks.worker import Worker
from tests.attacks.workplace import Workplace

LIMIT = 20.0
"""Seconds after which a command line gets Ctrl-C."""
DEMO_LIMIT = 4.0
"""The same of `pliant demo`: it takes half a minute, and says so before its first second."""


@dataclass(frozen=True)
class Sizes:
    """How many of each kind."""

    lines: int
    faults: int
    kills: int
    forgeries: int
    sealed: int
    """Of the forgeries, those whose checksum is right."""
    slow: int
    """1 for the good lines that take more than a quarter of a second, too; or 0."""
    workers: int = 1


SMALL = Sizes(lines=100, faults=20, kills=10, forgeries=8, sealed=8, slow=0)
WHOLE = Sizes(lines=2100, faults=150, kills=40, forgeries=600, sealed=400, slow=1, workers=2)


def attack(folder: Path, sizes: Sizes) -> list[Tally]:
    lines = command_lines.draw(sizes.lines)
    with ExitStack() as stack:
        first = Workplace.build(folder / "0")
        places = [first, *(first.copy(folder / str(i)) for i in range(1, sizes.workers))]
        workers = [stack.enter_context(Worker(place.environment)) for place in places]
        pool = stack.enter_context(ThreadPoolExecutor(sizes.workers))
        shares = [lines[i :: sizes.workers] for i in range(sizes.workers)]
        parts = list(pool.map(run_lines, workers, places, shares))
        good = run_good_lines(workers[0], places[0], bool(sizes.slow))
        others = [
            pool.submit(servers.attack_clients, workers[0], places[0], sizes.faults),
            pool.submit(forgeries.attack, workers[-1], places[-1], sizes.forgeries),
        ]
        done = [each.result() for each in others]
        done.append(forgeries.attack_sealed(workers[-1], places[-1], sizes.sealed))
        done.append(servers.attack_keys(workers[0], places[0]))
        done.append(kills.attack(workers[0], places[0], sizes.kills))
    return [good, _joined(parts), *done]


def run_good_lines(worker: Worker, place: Workplace, slow: bool) -> Tally:
    """Those from which the others are drawn succeed: the others fail for what was changed."""
    tally = Tally("good lines")
    for line in command_lines.good_lines(slow):
        before = place.state()
        line.prepare(place.cwd)
        done = worker.run(line.words, place.cwd)
        tally.add(line, fault(done, place.reset(before)) or not_right(done), done)
    return tally


def run_lines(worker: Worker, place: Workplace, lines: Sequence[CommandLine]) -> Tally:
    tally = Tally("command lines")
    for line in lines:
        before = place.state()
        line.prepare(place.cwd)
        limit = DEMO_LIMIT if line.command == "demo" else LIMIT
        done = worker.run(line.words, place.cwd, stdin=line.stdin, limit=limit)
        tally.add(line, fault(done, place.reset(before), may_work=line.may_work), done)
    return tally


def _joined(parts: Sequence[Tally]) -> Tally:
    tally = Tally(parts[0].kind)
    for part in parts:
        tally.tried += part.tried
        tally.wrong += part.wrong
        tally.codes += part.codes
        tally.interrupted += part.interrupted
    return tally
