"""Runs an answer's code and its tests: the script of the process that `sandbox.run_tests` starts.

It reads a request from its standard input, gives up what it may do, runs the answer and then each
test, and writes one line of JSON an event, each with the request's token: to its standard error
what comes before the answer, which cannot reach that file, and to its standard output the rest.
It imports nothing of Pliant.
"""

from __future__ import annotations

import builtins
import ctypes
import json
import os
import resource
import struct
import sys
import sysconfig
import types
from collections.abc import Callable, Iterator
from typing import Any

# Before an answer runs, which may replace the originals.
_compile, _exec, _exit, _write, _dumps = compile, exec, os._exit, os.write, json.dumps
_realpath, _isdir, _isabs = os.path.realpath, os.path.isdir, os.path.isabs
_fspath, _sep = os.fsdecode, os.sep
_getframe = sys._getframe
_BUILTINS = dict(vars(builtins))
globals()["__builtins__"] = _BUILTINS  # of the functions below, which an answer must not change

_NEW_IPC, _NEW_USER, _NEW_PID, _NEW_NET = 0x08000000, 0x10000000, 0x20000000, 0x40000000
_NETWORK = ("bind", "connect", "getaddrinfo", "gethostbyaddr", "gethostbyname", "sendmsg", "sendto")
_PROCESSES = ("exec", "fork", "forkpty", "kill", "killpg", "posix_spawn", "spawn", "system")
_REFUSED = {
    **dict.fromkeys([f"socket.{name}" for name in _NETWORK], "answers have no network"),
    **dict.fromkeys(
        [f"os.{name}" for name in _PROCESSES]
        + ["pty.spawn", "resource.prlimit", "resource.setrlimit", "subprocess.Popen"],
        "answers start and signal no processes",
    ),
    **dict.fromkeys(
        ["sys.monitoring.register_callback", "sys.setprofile", "sys.settrace"],
        "answers trace no code",
    ),
}
_C_CALLS = {"ctypes.call_function", "ctypes.dlopen", "ctypes.dlsym", "ctypes.dlsym/handle"}
_CHANGES = {"chmod", "chown", "link", "mkdir", "remove", "removexattr", "rename", "rmdir"}
_CHANGES |= {"setxattr", "symlink", "truncate", "utime"}
_CHANGES = {"sqlite3.connect", *(f"os.{name}" for name in _CHANGES)}
_SYSTEM = {
    *("/usr", "/lib", "/lib64", "/etc", "/dev", "/opt", "/nix", "/System", "/Library"),
    *("/proc/cpuinfo", "/proc/meminfo", "/proc/stat", "/sys/devices/system"),
}
_OWN = ("maps", "smaps", "stat", "statm", "status", "cmdline", "cgroup")  # of /proc/self
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def main() -> None:
    request = json.loads(sys.stdin.buffer.read())
    report, started = os.dup(1), os.dup(2)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    try:
        isolated = unshare()
        if isolated:
            wait_for_child()  # the first process of the namespace, with which all others end
            wait_for_child()  # the answer's: a namespace's first process ignores its own signals
        tests = compiled(request, started)
        guards = ["namespaces"] * isolated + give_up(request)
    except BaseException as error:
        say(started, request, failed=describe(error))
        _exit(1)
    say(started, request, guards=guards)
    os.close(started)
    run(request, tests, report)


def say(file: int, request: dict[str, Any], **event: object) -> None:
    _write(file, (_dumps({"token": request["token"], **event}) + "\n").encode())


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


def compiled(request: dict[str, Any], started: int) -> list[types.CodeType]:
    """The tests; that one is no Python is an error of the reference."""
    try:
        return [_compile(test, f"<test {i}>", "exec") for i, test in enumerate(request["tests"])]
    except (SyntaxError, ValueError) as error:
        say(started, request, broken=describe(error))
        _exit(1)


def run(request: dict[str, Any], tests: list[types.CodeType], report: int) -> None:
    """Write to the report what the answer's code does in the tests, and end the process."""
    answer = types.ModuleType("answer")
    sys.modules["answer"] = sys.modules["__main__"] = answer
    # The module, and not this script's copy: a test may patch `builtins.input` for the answer.
    answer.__dict__["__builtins__"] = builtins
    try:
        _exec(first_that_compiles(request["sources"]), answer.__dict__)
    except BaseException as error:  # also SystemExit: an answer that leaves has passed nothing
        say(report, request, error=describe(error))
        _exit(1)
    # Once: a later test must know the TestCase of an earlier one.
    for name in [name for name in sys.modules if name.partition(".")[0] == "unittest"]:
        del sys.modules[name]
    for i, test in enumerate(tests):
        try:
            restore(answer.__dict__)
            _exec(test, answer.__dict__)
            say(report, request, test=i, passed=True)
        except BaseException as error:
            say(report, request, test=i, passed=False, error=describe(error))
            if not request["partial"]:
                break
    say(report, request, done=True)
    _exit(0)


def restore(namespace: dict[str, Any]) -> None:
    """Give a test Python's own functions, whatever the answer made of them."""
    vars(builtins).update(_BUILTINS)
    namespace["__builtins__"] = builtins


def give_up(request: dict[str, Any]) -> list[str]:
    """Do without all that an answer must not have; which guards of the kernel there are."""
    limit(request)
    folder = _realpath(request["folder"])
    guards = ["files"] * confine_files(folder) + ["calls"] * filter_calls()
    # `open` is audited without the folder that a path is relative to: nothing may use one.
    os.supports_dir_fd.clear()
    sys.settrace, sys.setprofile = only_none(sys.settrace), only_none(sys.setprofile)
    sys.addaudithook(guard(folder))
    return guards


def only_none(trace: Callable[[Any], None]) -> Callable[[Any], None]:
    """Setting None, as doctest does, has no effect; the audit refuses a function."""

    def set_trace(function: Any, /) -> None:
        if function is not None:
            trace(function)

    return set_trace


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
    """Processor time in whole seconds, memory, size and number of open files, no core dumps."""
    for kind, most in (
        (resource.RLIMIT_CPU, request["cpu_seconds"]),
        (resource.RLIMIT_AS, request["memory_mb"] << 20),
        (resource.RLIMIT_FSIZE, request["file_mb"] << 20),
        (resource.RLIMIT_NOFILE, 64),  # each may be a file of that size without a name
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        if hard != resource.RLIM_INFINITY:
            most = min(most, hard)
        try:
            resource.setrlimit(kind, (most, most))
        except (ValueError, OSError):  # macOS knows no limit of memory
            continue


# --- what Python's audit events prevent ----------------------------------------------------------


def guard(folder: str) -> Callable[[str, tuple[Any, ...]], None]:
    """An audit hook: no network, processes, tracing or C library; files only where they belong."""
    places = {*_SYSTEM, sys.prefix, sys.base_prefix, *filter(None, sys.path), *editable()}
    places |= {f"/proc/self/{name}" for name in _OWN}
    readable = {_realpath(place) for place in places}
    standard = tuple(f"{sysconfig.get_path(kind)}{_sep}" for kind in ("stdlib", "platstdlib"))
    installed = ("site-packages", "dist-packages")

    def inside(path: Any, *folders: str) -> bool:
        if isinstance(path, int):
            return True  # a file that is open already
        real = _realpath(_fspath(path))
        return real == os.devnull or any(
            real == place or real.startswith(place + _sep) for place in (folder, *folders)
        )

    def by_library() -> bool:
        """Whether an installed package asks, and not the answer: the nearest code that is not
        Python's own. An answer that names its code as a package's passes for one."""
        frame: types.FrameType | None = _getframe(2)
        while frame:
            file = frame.f_code.co_filename
            own = file.startswith(standard) and not any(name in file for name in installed)
            if not own and not file.startswith("<frozen "):
                return _isabs(file) and not inside(file) and inside(file, *readable)
            frame = frame.f_back
        return False

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _REFUSED:
            raise PermissionError(_REFUSED[event])
        if event in _C_CALLS:
            if not by_library():
                raise PermissionError("answers call no C library")
            file = arguments[0] if event == "ctypes.dlopen" else None
            if file and _sep in _fspath(file) and not inside(file, *readable):
                raise PermissionError(f"answers read only their own folder, not {file!r}")
        if event == "open":
            path, _, flags = arguments
            if path is None or isinstance(path, int):
                return
            if (flags or 0) & _WRITING and not inside(path):
                raise PermissionError(f"answers write only to their own folder, not to {path!r}")
            if not inside(path, *readable):
                raise PermissionError(f"answers read only their own folder, not {path!r}")
            if _isdir(path):  # paths may be relative to an open one
                raise PermissionError("answers open no folders")
        elif event in _CHANGES:
            paths = arguments[:2] if event in ("os.link", "os.rename") else arguments[:1]
            if event == "os.symlink":  # where it leads is read when it is used
                paths = arguments[1:2]
            if not all(inside(path) for path in paths):
                raise PermissionError(f"answers change only their own folder, not {paths!r}")

    return hook


def editable() -> Iterator[str]:
    """Where packages are that setuptools has installed from their folders of source."""
    for finder in sys.meta_path:
        module = sys.modules.get(getattr(finder, "__module__", ""))
        for location in getattr(module, "MAPPING", {}).values():
            yield from (location, f"{location}.py")


# --- what the kernel prevents, where it can ------------------------------------------------------


def confine_files(folder: str) -> bool:
    """Whether Landlock (Linux 6.2) confines writing to the folder, by whatever code it is done.

    It also forbids programs, TCP, and to trace or signal a process outside. Reading, modes
    and times of files are free.
    """
    if not sys.platform.startswith("linux"):
        return False
    version = _syscall(_LANDLOCK, 0, 0, 1)
    if version < 3:  # before, it forbids every rename between folders and permits to truncate
        return False
    write_rights = sum(1 << right for right in (1, *range(4, 15)))
    attributes = struct.pack("<QQQ", write_rights | _EXECUTE, 0b11, 0b11)
    known = 8 if version < 4 else 16 if version < 6 else 24
    ruleset = _syscall(_LANDLOCK, attributes, known, 0)
    if ruleset < 0:
        return False
    confined = _no_new_privileges()
    for place, rights in ((folder, write_rights), (os.devnull, write_rights & _FILE_RIGHTS)):
        descriptor = os.open(place, os.O_RDONLY)
        rule = struct.pack("<Qi", rights, descriptor)
        confined = confined and _syscall(_LANDLOCK + 1, ruleset, 1, rule, 0) == 0
        os.close(descriptor)
    confined = confined and _syscall(_LANDLOCK + 2, ruleset, 0) == 0
    os.close(ruleset)
    return confined


_LANDLOCK = 444
_EXECUTE, _FILE_RIGHTS = 1 << 0, 1 << 1 | 1 << 14  # to write to a file, to truncate it

# What has no place in an answer's run, by number on x86-64 and on ARM.
_DENIED = {
    "socket": (41, 198),
    "connect": (42, 203),
    "bind": (49, 200),
    "fork": (57, None),
    "vfork": (58, None),
    "execve": (59, 221),
    "execveat": (322, 281),
    "kill": (62, 129),
    "tkill": (200, 130),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424),
    "pidfd_getfd": (438, 438),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "setpriority": (141, 140),
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "io_uring_setup": (425, 425),
    "userfaultfd": (323, 282),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
}
_OF_ITSELF = {"tgkill": (234, 131), "prlimit64": (302, 261), "sched_setaffinity": (203, 122)}
_CLONE, _CLONE3 = (56, 220), 435
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}


def filter_calls() -> bool:
    """Whether seccomp denies this process the calls above, and new processes but no threads."""
    if not sys.platform.startswith("linux") or os.uname().machine not in _MACHINES:
        return False
    column, machine = _MACHINES[os.uname().machine]
    program = b"".join(_filter(column, machine))
    code = ctypes.create_string_buffer(program, len(program))
    program_header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code))
    return _no_new_privileges() and ctypes.CDLL(None).prctl(22, 2, program_header, 0, 0) == 0


def _filter(column: int, machine: int) -> Iterator[bytes]:
    """A program of the kernel's packet filter, over the number and arguments of a call."""

    def step(code: int, value: int, then: int = 0, otherwise: int = 0) -> bytes:
        return struct.pack("=HBBI", code, then, otherwise, value)

    load, equal, at_least, has_bits, return_ = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, deny, unknown = 0x7FFF0000, 0x00050001, 0x00050000 | 38
    first_argument = 16
    yield step(load, 4) + step(equal, machine, 1) + step(return_, deny)
    yield step(load, 0) + step(at_least, 0x40000000, 0, 1) + step(return_, deny)
    for numbers in _DENIED.values():
        number = numbers[column]
        if number is not None:
            yield step(equal, number, 0, 1) + step(return_, deny)
    for numbers in _OF_ITSELF.values():
        yield step(equal, numbers[column], 0, 5) + step(load, first_argument)
        yield step(equal, 0, 2) + step(equal, os.getpid(), 1)
        yield step(return_, deny) + step(return_, allow)
    yield step(equal, _CLONE[column], 0, 4) + step(load, first_argument)
    yield step(has_bits, 0x10000, 1) + step(return_, deny) + step(return_, allow)  # CLONE_THREAD
    yield step(equal, _CLONE3, 0, 1) + step(return_, unknown)  # the C library then uses clone
    yield step(return_, allow)


def _no_new_privileges() -> bool:
    return bool(ctypes.CDLL(None).prctl(38, 1, 0, 0, 0) == 0)


def _syscall(number: int, *arguments: int | bytes) -> int:
    words = (word if isinstance(word, bytes) else ctypes.c_long(word) for word in arguments)
    result: int = ctypes.CDLL(None).syscall(ctypes.c_long(number), *words)
    return result


def describe(error: BaseException) -> str:
    """An exception on one short line."""
    try:
        text = f"{type(error).__name__}: {error}".removesuffix(": ")
    except BaseException:  # an answer's exception may have any __str__
        text = type(error).__name__
    return " ".join(text.split())[:200]


if __name__ == "__main__":
    main()
