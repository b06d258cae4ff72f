"""Programs in processes of their own that need no import: a new `python` spends eight seconds on
torch and transformers, more than most of what is tested in it.

The standard library's fork server imports them once and forks for each program. It has run nothing
itself, so that a program finds the libraries as a new interpreter would.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import shutil
import sys
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TextIO

import torch.distributed as dist

HEAVY = ["torch.distributed", "transformers.trainer", "transformers.models.llama.modeling_llama"]
"""What the fork server imports."""

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(HEAVY)


class Program:
    """`python -m MODULE WORD...`, running: its output and errors can be read as they come."""

    def __init__(
        self, module: str, *words: str, cwd: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        ours, theirs = zip(*(_context.Pipe(duplex=False) for _ in range(2)), strict=True)
        environment = dict(os.environ if environment is None else environment)
        given = (module, words, str(cwd), environment, theirs)
        self.process = _context.Process(target=_run, args=given)
        self.process.start()
        for end in theirs:
            end.close()
        self.stdout, self.stderr = map(_lines, ours)

    def send_signal(self, signal: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, signal)

    def wait(self, timeout: float) -> int:
        """Its exit code; of a killed one, the negative number of the signal."""
        self.process.join(timeout)
        code = self.process.exitcode
        assert code is not None, f"it has not ended after {timeout} seconds"
        return code

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *error: Any) -> None:
        self.process.kill()
        self.process.join()
        self.stdout.close()
        self.stderr.close()


def run_two(module: str, *words: str, cwd: Path, **environment: str) -> list[str]:
    """What two processes of one program print, which find each other as torchrun's do.

    Fails with their errors unless both end with success. If a signal ended one of them, torch's own
    threads crashed (twice in about forty runs of all tests): both are then started once more.
    """
    folders = [Path(word) for word in words if Path(word).is_dir()]
    before = {path for folder in folders for path in folder.iterdir()}
    texts, codes = _two(module, *words, cwd=cwd, **environment)
    if min(codes) < 0:
        for path in {path for folder in folders for path in folder.iterdir()} - before:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        texts, codes = _two(module, *words, cwd=cwd, **environment)
    assert codes == [0, 0], "\n".join([f"exit codes {codes}", *(t[-3000:] for t in texts[1::2])])
    return texts[::2]


def _two(module: str, *words: str, cwd: Path, **environment: str) -> tuple[list[str], list[int]]:
    """What they print, each with its errors, and their exit codes."""
    # The store is ours, and so the port is free: the processes join it.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    common |= {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    common |= {"TORCHELASTIC_RESTART_COUNT": "0", "OMP_NUM_THREADS": "1"}
    programs = []
    for rank in ("0", "1"):
        own = {**os.environ, **common, **environment, "RANK": rank, "LOCAL_RANK": rank}
        programs.append(Program(module, *words, cwd=cwd, environment=own))
    texts = _all_of([end for program in programs for end in (program.stdout, program.stderr)])
    codes = [program.wait(timeout=60) for program in programs]
    for program in programs:
        program.__exit__()
    return texts, codes


def _all_of(streams: list[TextIO]) -> list[str]:
    """All that comes on several pipes, none of which may fill up while another is read."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(len(streams)) as readers:
        return list(readers.map(lambda stream: stream.read(), streams))


def _lines(end: Connection) -> TextIO:
    stream = os.fdopen(os.dup(end.fileno()))
    end.close()
    return stream


def _run(
    module: str,
    words: tuple[str, ...],
    cwd: str,
    environment: dict[str, str],
    outputs: tuple[Connection, Connection],
) -> None:
    """In the forked process."""
    for number, end in enumerate(outputs, start=1):
        os.dup2(end.fileno(), number)
        end.close()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.path.insert(0, cwd)
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
