"""Runs an answer's code and its tests: the script of the process that `sandbox.run_tests` starts.

It reads a request from its standard input, gives up what it may do, runs the answer and then each
test, and writes one line of JSON an event to its standard output, each with the request's token.
It imports nothing of Pliant.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import sys
import types
from collections.abc import Callable
from typing import Any

# Before an answer runs, which may replace the originals.
_compile, _exec, _exit, _write, _dumps = compile, exec, os._exit, os.write, json.dumps
_realpath, _isdir, _fspath, _sep = os.path.realpath, os.path.isdir, os.fsdecode, os.sep

_NEW_IPC, _NEW_USER, _NEW_PID, _NEW_NET = 0x08000000, 0x10000000, 0x20000000, 0x40000000
_NETWORK = {
    "socket.bind",
    "socket.connect",
    "socket.getaddrinfo",
    "socket.gethostbyaddr",
    "socket.gethostbyname",
    "socket.sendmsg",
    "socket.sendto",
}
_PROCESSES = {
    "os.exec",
    "os.fork",
    "os.forkpty",
    "os.kill",
    "os.killpg",
    "os.posix_spawn",
    "os.spawn",
    "os.system",
    "pty.spawn",
    "subprocess.Popen",
}
_CHANGES = {
    "os.chmod",
    "os.chown",
    "os.link",
    "os.mkdir",
    "os.remove",
    "os.removexattr",
    "os.rename",
    "os.rmdir",
    "os.setxattr",
    "os.symlink",
    "os.truncate",
    "os.utime",
    "sqlite3.connect",
}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def main() -> None:
    request = json.loads(sys.stdin.buffer.read())
    report = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    isolated = unshare()
    if isolated:
        wait_for_child()  # the first process of the namespace, with which all others end
        wait_for_child()  # the answer's: the first process of a namespace ignores its own signals
    run(request, report, "namespace" if isolated else "sockets blocked")


def unshare() -> bool:
    """Whether this process got its own network, processes and user, where the system allows it."""
    try:
        libc = ctypes.CDLL(None)
        return bool(libc.unshare(_NEW_USER | _NEW_PID | _NEW_NET | _NEW_IPC) == 0)
    except (AttributeError, OSError):  # no Linux
        return False


def wait_for_child() -> None:
    """Go on in a new process; this one ends when that one does."""
    child = os.fork()
    if not child:
        return
    while True:
        ended, status = os.wait()
        if ended == child:
            _exit(0 if status == 0 else 1)


def run(request: dict[str, Any], report: int, network: str) -> None:
    """Write to the report what the answer's code does in the tests, and end the process."""
    token = request["token"]

    def say(**event: object) -> None:
        _write(report, (_dumps({"token": token, **event}) + "\n").encode())

    say(network=network)
    tests = request["tests"]
    try:
        compiled = [_compile(test, f"<test {i}>", "exec") for i, test in enumerate(tests)]
    except (SyntaxError, ValueError) as error:
        say(broken=describe(error))
        _exit(1)
    limit(request)
    sys.addaudithook(guard(_realpath(request["folder"])))
    answer = types.ModuleType("answer")
    sys.modules["answer"] = sys.modules["__main__"] = answer
    try:
        _exec(first_that_compiles(request["sources"]), answer.__dict__)
    except BaseException as error:  # also SystemExit: an answer that leaves has passed nothing
        say(error=describe(error))
        _exit(1)
    for i, test in enumerate(compiled):
        try:
            _exec(test, answer.__dict__)
            say(test=i, passed=True)
        except BaseException as error:
            say(test=i, passed=False, error=describe(error))
            if not request["partial"]:
                break
    say(done=True)
    _exit(0)


def first_that_compiles(sources: list[str]) -> types.CodeType:
    """The answer can be read in several ways: the first that is Python counts."""
    failures = []
    for source in sources:
        try:
            code: types.CodeType = _compile(source, "<answer>", "exec")
            return code
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            failures.append(error)
    raise failures[0]


def limit(request: dict[str, Any]) -> None:
    """Processor time in whole seconds, memory, the size of a file, and no core dumps."""
    for kind, most in (
        (resource.RLIMIT_CPU, request["cpu_seconds"]),
        (resource.RLIMIT_AS, request["memory_mb"] << 20),
        (resource.RLIMIT_FSIZE, request["file_mb"] << 20),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        if hard != resource.RLIM_INFINITY:
            most = min(most, hard)
        try:
            resource.setrlimit(kind, (most, most))
        except (ValueError, OSError):  # macOS knows no limit of memory
            continue


def guard(folder: str) -> Callable[[str, tuple[Any, ...]], None]:
    """An audit hook: no network, no processes, and changes of files only inside the folder."""

    def inside(path: Any) -> bool:
        if isinstance(path, int):
            return True  # a file that is open already
        real = _realpath(_fspath(path))
        return real == folder or real.startswith(folder + _sep) or real == os.devnull

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _NETWORK:
            raise PermissionError("answers have no network")
        if event in _PROCESSES:
            raise PermissionError("answers start and signal no processes")
        if event == "open":
            path, _, flags = arguments
            if path is None or inside(path):
                return
            # A folder that is open is a way around the rest: paths may be relative to it.
            if (flags or 0) & _WRITING or _isdir(path):
                raise PermissionError(f"answers write only to their own folder, not to {path!r}")
        elif event in _CHANGES:
            paths = arguments[:2] if event in ("os.link", "os.rename") else arguments[:1]
            if event == "os.symlink":  # where it leads is read when it is used
                paths = arguments[1:2]
            if not all(inside(path) for path in paths):
                raise PermissionError(f"answers change only their own folder, not {paths!r}")

    return hook


def describe(error: BaseException) -> str:
    """An exception on one short line."""
    try:
        text = f"{type(error).__name__}: {error}".removesuffix(": ")
    except BaseException:  # an answer's exception may have any __str__
        text = type(error).__name__
    return " ".join(text.split())[:200]


if __name__ == "__main__":
    main()
