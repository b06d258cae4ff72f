"""Attacks on the sandbox from inside: an answer that reaches for what is not its own.

Two guards hold it, the kernel's and Python's audit events. Each attack is tried with both, and with
each of them alone that claims to prevent it.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pliant.errors import PliantError
from pliant.verify import sandbox
from pliant.verify.sandbox import kernel_guards, run_tests

CALLS = {"namespaces": "unshare()", "files": "confine_files(folder)", "calls": "filter_calls()"}
AUDIT = "sys.addaudithook(guard(folder))"


def needs(guard: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        guard not in kernel_guards(), reason=f"the kernel lacks some guards: {guard}"
    )


C = "import ctypes, os\nlibc = ctypes.CDLL(None)\n"
FORK_EXEC = (
    "import _posixsubprocess as p\np.fork_exec([b'/bin/touch', b'{outside}/new'], [b'/bin/touch'], "
    "True, (), None, None, -1, -1, -1, -1, -1, -1, 3, 4, False, False, -1, None, None, None, -1, "
    "None, False)"
)
"""What Python's subprocess calls; it raises no audit event."""
BOTH = {
    "write": "open('{outside}/old', 'w').write('x')",
    "delete": "import os\nos.remove('{outside}/old')",
    "delete the folder": "import shutil\nshutil.rmtree('{outside}')",
    "link": "import os\nos.symlink('{outside}/old', 'x')\nopen('x', 'w').write('x')",
    "rename": "import os\nos.rename('{outside}/old', 'x')",
    "a path relative to an open folder": (
        "import os\nos.makedirs('a/b')\nhere = os.open('.', os.O_RDONLY)\nos.chdir('a')\n"
        "os.open('../{name}', os.O_CREAT | os.O_WRONLY, dir_fd=here)"
    ),
    "TCP": "import socket\nsocket.create_connection(('127.0.0.1', {tcp}), 1)",
    "UDP": "import socket\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
    "s.sendto(b'x', ('127.0.0.1', {udp}))",
    "unix socket": "import socket\ns = socket.socket(socket.AF_UNIX)\ns.connect('{unix}')",
    "listen": "import socket\nsocket.create_server(('127.0.0.1', 0))",
    "fork": "import os\nos.fork() or os._exit(0)",
    "program": "import os\nos.execv('/bin/touch', ['touch', '{outside}/new'])",
    "kill": "import os\nos.kill({sleeper}, 9)",
    "limits of our process": (
        "import resource\nresource.prlimit({sleeper}, resource.RLIMIT_CPU, (0, 0))"
    ),
    "our keys": "print(open('/proc/{ours}/environ').read()[0])",
    "our memory": "open('/proc/{ours}/mem', 'rb')",
}
KERNEL_ALONE = {
    "sqlite by address": (
        "import sqlite3\nc = sqlite3.connect('file:{outside}/new', uri=True)\n"
        "c.execute('create table t (a)')"
    ),
    "sqlite attached": (
        "import sqlite3\nc = sqlite3.connect(':memory:')\nc.execute('attach ? as x', "
        "('{outside}/new',))\nc.execute('create table x.t (a)')"
    ),
    "fifo": "import os\nos.mkfifo('{outside}/new')",
    "device": "import os\nos.mknod('{outside}/new')",
    "shared memory": (
        "import _posixshmem, os\n_posixshmem.shm_open('/{name}', os.O_CREAT | os.O_RDWR)"
    ),
    "fork and execute": FORK_EXEC,
    "signal by descriptor": (
        "import os, signal\nsignal.pidfd_send_signal(os.pidfd_open({sleeper}), 9)"
    ),
}
"""What Python's audit does not see."""
AUDIT_ALONE = {
    "a key in a file": "open('{outside}/old').read()",
    "mode": "import os\nos.chmod('{outside}/old', 0o777)",
    "C library": C + "libc.getpid()",
    "C library by a thread": "import ctypes, threading\nerrors = []\n"
    "threading.excepthook = lambda e: errors.append(e.exc_value)\n"
    "t = threading.Thread(target=ctypes.CDLL, args=(None,))\nt.start()\nt.join()\n"
    "raise errors[0]",
    "tracing": "import sys\nsys.settrace(print)",
    "profiling": "import sys\nsys.setprofile(print)",
    "higher limits": "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (1, 1))",
}
"""What the kernel does not forbid."""
BY_C = {
    "calls": {
        "socket": "libc.socket(2, 1, 0)",
        "fork": "libc.fork() or os._exit(0)",
        "fork by number": "libc.syscall(57 if os.uname().machine == 'x86_64' else 220, 17)",
        "kill": "libc.kill({sleeper}, 9)",
        "thread kill": "libc.tgkill({sleeper}, {sleeper}, 9)",
        "trace": "libc.ptrace(16, {sleeper}, 0, 0)",
        "queue": "libc.msgget(0, 0o1600)",
        "new namespaces": "libc.unshare(0x10000000)",
    },
    "files": {
        "write": "libc.open(b'{outside}/old', 1)",
        "create": "libc.creat(b'{outside}/new', 0o600)",
        "truncate": "libc.truncate(b'{outside}/old', 0)",
        "trace": "libc.ptrace(16, {sleeper}, 0, 0)",
    },
    "namespaces": {"kill": "libc.kill({sleeper}, 9)"},
}
"""Calls that return -1."""


HELD_BY = {
    "files": [
        *("write", "delete", "delete the folder", "link", "rename", "program"),
        *("a path relative to an open folder", "our memory", "sqlite by address"),
        *("sqlite attached", "fifo", "device", "shared memory"),
    ],
    "calls": [
        *("TCP", "UDP", "unix socket", "listen", "fork", "program", "kill"),
        *("limits of our process", "fork and execute", "signal by descriptor"),
    ],
    "namespaces": [
        *("TCP", "UDP", "kill", "limits of our process", "signal by descriptor", "our keys"),
        "our memory",
    ],
}
"""Which guards of the kernel hold an attack, each of them alone."""
ATTACKS = [
    pytest.param(guard, attack, marks=needs(guard), id=f"{guard}-{attack}")
    for guard, attacks in HELD_BY.items()
    for attack in attacks
]


@dataclass(frozen=True)
class Victim:
    """What answers must not reach."""

    outside: Path
    sleeper: subprocess.Popen[bytes]
    sockets: dict[str, socket.socket]
    words: dict[str, Any] = field(default_factory=dict)

    def code(self, attack: str) -> str:
        for word, value in self.words.items():
            attack = attack.replace(f"{{{word}}}", str(value))
        return attack

    def harm(self) -> list[str]:
        harm = ["files"] * ([path.name for path in self.outside.iterdir()] != ["old"])
        harm += ["content"] * (not harm and (self.outside / "old").read_text() != "old")
        harm += ["mode"] * (not harm and (self.outside / "old").stat().st_mode & 0o777 != 0o600)
        harm += ["killed"] * (self.sleeper.poll() is not None)
        name = self.words["name"]
        harm += [f"{place}/{name}" for place in ("/tmp", "/dev/shm") if Path(place, name).exists()]
        for kind, listening in self.sockets.items():
            try:
                listening.recv(1) if kind == "udp" else listening.accept()
            except BlockingIOError:
                continue
            harm.append(kind)
        return harm


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Victim]:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "old").write_text("old")
    (outside / "old").chmod(0o600)
    sleeper = subprocess.Popen(["sleep", "600"])
    tcp = socket.create_server(("127.0.0.1", 0))
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind(("127.0.0.1", 0))
    unix = socket.socket(socket.AF_UNIX)
    unix.bind(str(tmp_path / "unix"))
    unix.listen()
    sockets = {"tcp": tcp, "udp": udp, "unix": unix}
    for each in sockets.values():
        each.setblocking(False)
    words = {"outside": outside, "sleeper": sleeper.pid, "ours": os.getpid()}
    words |= {"tcp": tcp.getsockname()[1], "udp": udp.getsockname()[1], "unix": tmp_path / "unix"}
    words |= {"name": f"pliant-attack-{os.getpid()}"}
    yield Victim(outside, sleeper, sockets, words)
    for each in sockets.values():
        each.close()
    sleeper.kill()
    sleeper.wait()


@pytest.fixture
def audit_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a system whose kernel has none of the guards."""
    without(monkeypatch, tmp_path, *CALLS.values())


def without(
    monkeypatch: pytest.MonkeyPatch, folder: Path, *calls: str, instead: str = "False"
) -> None:
    """The same script, which leaves out these calls."""
    script = sandbox._SCRIPT.read_text()
    for call in calls:
        pattern = rf"(?<!def ){re.escape(call)}(?!\w|:)"
        assert len(re.findall(pattern, script)) == 1, call
        script = re.sub(pattern, instead, script)
    (folder / "script.py").write_text(script)
    monkeypatch.setattr(sandbox, "_SCRIPT", folder / "script.py")


def fails(victim: Victim, code: str) -> str:
    """The error of an answer that would pass if it succeeded."""
    outcome = run_tests([victim.code(code)], ["pass"], seconds=5)
    assert victim.harm() == []
    assert not outcome
    return outcome.error


@pytest.mark.parametrize("attack", [*KERNEL_ALONE, *AUDIT_ALONE])
def test_an_answer_reaches_nothing_outside(attack: str, victim: Victim) -> None:
    holding = {guard for guard, attacks in HELD_BY.items() if attack in attacks}
    if attack in KERNEL_ALONE and not holding & set(kernel_guards()):
        pytest.skip("the kernel lacks some guards: " + ", ".join(holding))
    error = fails(victim, (KERNEL_ALONE | AUDIT_ALONE)[attack])
    assert any(word in error for word in ("Permission", "OperationalError", "ProcessLookup"))


@pytest.mark.usefixtures("audit_alone")
def test_without_the_kernel_no_guard_of_it_is_claimed() -> None:
    assert run_tests(["pass"], ["pass"]).guards == ()


@pytest.mark.usefixtures("audit_alone")
@pytest.mark.parametrize("attack", [*BOTH, *AUDIT_ALONE])
def test_without_the_kernel_pythons_audit_holds_it(attack: str, victim: Victim) -> None:
    error = fails(victim, (BOTH | AUDIT_ALONE)[attack])
    assert "answers" in error or attack == "listen", error


@pytest.mark.parametrize(("guard", "attack"), ATTACKS)
def test_each_guard_of_the_kernel_holds_it_alone(
    guard: str, attack: str, victim: Victim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, tmp_path, AUDIT, *(call for name, call in CALLS.items() if name != guard))
    assert "answers" not in fails(victim, (BOTH | KERNEL_ALONE)[attack])


def test_no_attack_is_left_out() -> None:
    assert {attack for attacks in HELD_BY.values() for attack in attacks} == {*BOTH, *KERNEL_ALONE}


@pytest.mark.parametrize("guard", [pytest.param(guard, marks=needs(guard)) for guard in BY_C])
def test_the_kernel_holds_the_c_library_too(
    guard: str, victim: Victim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, tmp_path, AUDIT, *(call for name, call in CALLS.items() if name != guard))
    lines = [f"assert {victim.code(call)} == -1, {name!r}" for name, call in BY_C[guard].items()]
    outcome = run_tests([C + "\n".join(lines)], ["assert libc.getpid() > 0"])
    assert outcome, outcome.error
    assert victim.harm() == []


# --- limits --------------------------------------------------------------------------------------


LOOPS = {
    "loop": "while True: pass",
    "sleep": "import time\ntime.sleep(600)",
    "no signals": "import signal\nfor s in signal.valid_signals() - {9, 19, 32, 33}:\n"
    "    try: signal.signal(s, signal.SIG_IGN)\n    except (OSError, ValueError): pass\n"
    "while True: pass",
    "stopped": "import signal\nsignal.raise_signal(signal.SIGSTOP)",
}
TAKES = [
    ("x = bytearray(300 << 20)", "MemoryError"),
    ("x = ['x']\nwhile True: x += x", "MemoryError"),
    ("f = open('x', 'wb')\nwhile True: f.write(bytes(1 << 20))", "File too large"),
    ("n = 0\nwhile True:\n    open(str(n), 'wb').write(bytes(1 << 20)); n += 1", "2 MB of files"),
    ("open('x', 'wb').write(bytes(1 << 20))\nopen('y', 'wb').write(bytes(3 << 19))", "2 MB of"),
    ("for n in range(600): open(str(n), 'w').close()", "2 MB of files"),
    ("import os\nfor _ in range(9999): os.mkdir('a' * 99); os.chdir('a' * 99)", "nested deeper"),
    ("import os\nx = [os.memfd_create('x') for _ in range(99)]", "Too many open files"),
    ("import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(600,)).start()",
     "can't start new thread"),
    ("def f(): f()\nf()", "RecursionError"),
    ("import sys\nsys.setrecursionlimit(10**6)\nx = []\nfor _ in range(10**5): x = [x]\nrepr(x)",
     "it ended before"),
    ("x = " + "(" * 5000 + ")" * 5000, "too many nested parentheses"),
    ("x = " + "-" * 200_000 + "1", "Error"),
    ("x = 'a\0b'", "null bytes"),
    ("x = '\ud800'", "surrogates not allowed"),
    ("raise ValueError('\\ud800' * 10**6)", "ValueError"),
    ("raise ValueError(10**5000)", "ValueError"),
]  # fmt: skip


@pytest.mark.parametrize("loop", LOOPS)
def test_time_is_limited(loop: str) -> None:
    assert run_tests([LOOPS[loop]], ["pass"], seconds=0.3).error == "no end after 0.3 s"


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EPERM])
def test_time_is_limited_where_the_kernel_refuses_pidfd(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(process: int) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pidfd_open", refuse, raising=False)
    assert run_tests(["pass"], ["pass"])
    assert run_tests([LOOPS["sleep"]], ["pass"], seconds=0.3).error == "no end after 0.3 s"


def test_the_time_begins_when_it_has_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = "(__import__('time').sleep(2.1), limit(request))"
    without(monkeypatch, tmp_path, "limit(request)", instead=slow)
    assert run_tests(["pass"], ["pass"], seconds=2)
    monkeypatch.setattr(sandbox, "_LONGEST_START", 0.3)
    with pytest.raises(PliantError, match=r"did not start: it had not started after 0\.3 s"):
        run_tests(["pass"], ["pass"])


@pytest.mark.parametrize("depth", [1500, 6000])  # a path may have 4,096 bytes
def test_nested_folders_are_measured_and_removed(
    depth: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    nest = f"import os\nfor _ in range({depth}): os.mkdir('a'); os.chdir('a')\nos.chmod('.', 0)"
    outcome = run_tests([nest], ["pass"], seconds=60, file_mb=64)
    assert bool(outcome) == (depth == 1500), outcome.error
    assert depth == 1500 or "nested deeper" in outcome.error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("code", "error"), TAKES)
def test_what_an_answer_takes_is_limited(code: str, error: str) -> None:
    outcome = run_tests([code], ["pass"], seconds=60, memory_mb=256, file_mb=2)
    assert not outcome and error in outcome.error and "no end" not in outcome.error


def test_a_flood_of_output_is_dropped() -> None:
    flood = "import os, sys\nprint('x' * (50 << 20))\nsys.stderr.write('x' * (50 << 20))\n"
    assert run_tests([flood + "os.write(1, bytes(50 << 20))"], ["pass"])


def test_processes_that_it_leaves_behind_are_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the filter of calls: one that left its group, by the C library."""
    leaves = C + "if libc.fork() == 0:\n    {}libc.pause()\nraise ValueError(os.getcwd())"
    cases = {"libc.setsid(); ": ["filter_calls()", AUDIT]}
    if "namespaces" not in kernel_guards():
        cases = {}
    cases[""] = ["filter_calls()", AUDIT, "unshare()"]  # its group is dead in any case
    for leaving, guards in cases.items():
        with monkeypatch.context() as patch:
            without(patch, tmp_path, *guards)
            error = run_tests([leaves.format(leaving)], ["pass"]).error
        assert "pliant-answer-" in error, error
        assert nobody_stands_in(error.removeprefix("ValueError: "))


# --- the verdict ---------------------------------------------------------------------------------

TOKEN_THIEF = (
    "import os\nfor fd in range(64):\n    try:\n        text = os.pread(fd, 10**6, 0)\n"
    "        os.write(fd, text.replace(b'false', b'true'))\n    except OSError: pass\n"
)
VERDICTS = {
    "exit": "import sys\nsys.exit(0)",
    "exit hard": "import os\nos._exit(0)",
    "exit when it is called": "def f(): import os; os._exit(0)",
    "exit at the end": "import atexit, os\natexit.register(os._exit, 0)",
    "an exception that leaves": "class E(BaseException):\n    def __str__(self):\n"
    "        import os\n        os._exit(0)\nraise E",
    "says passed": "print('passed', '1 passed', 'OK', flush=True)",
    "a report without the token": "import os\nfor fd in range(64):\n"
    "    try: os.write(fd, b'{\"token\": \"\", \"test\": 0, \"passed\": 1, \"done\": 1}\\n')\n"
    "    except OSError: pass",
    "a report that is read": TOKEN_THIEF,
    "functions": "import builtins\nfor n in ('all', 'any', 'len', 'isinstance', 'exec', 'compile', "
    "'enumerate'):\n    setattr(builtins, n, lambda *a, **k: 3)",
    "exceptions": "import builtins\nbuiltins.AssertionError = builtins.BaseException = KeyError",
    "functions, in place": "f = __builtins__ if isinstance(__builtins__, dict) else "
    "vars(__builtins__)\nf.update(all=lambda x: True, len=lambda x: 3)",
    "all functions": "__builtins__ = {'all': lambda x: True, 'len': lambda x: 3}",
    "unittest": "import unittest\nunittest.TestCase.assertEqual = lambda *a: None\n"
    "unittest.TestResult.wasSuccessful = lambda self: True",
    "modules": "import sys, json, os\nsys.modules.clear()\njson.dumps = os.write = None",
    "hooks": "import sys\nsys.excepthook = sys.unraisablehook = lambda *a: None",
    "trace": "import sys\ndef t(frame, event, _):\n"
    "    if event == 'line' and frame.f_code.co_filename == '<test 0>': frame.f_lineno = 4\n"
    "    return t\ntry: sys.settrace(t)\nexcept OSError: pass",
}  # fmt: skip
TEST = """x = all([False])
assert x
assert len([1]) == 3
y = 1
"""
UNIT_TEST = """import unittest
class T(unittest.TestCase):
    def test(self): self.assertEqual(1, 2)
assert unittest.TextTestRunner().run(T('test')).wasSuccessful()
"""


@pytest.mark.parametrize("attack", VERDICTS)
def test_a_verdict_is_not_replaced(attack: str) -> None:
    assert not run_tests([VERDICTS[attack]], [UNIT_TEST if attack == "unittest" else TEST])


@pytest.mark.parametrize(
    "code", ["os.ftruncate(fd, 0)", "os.pwrite(fd, b'x' * 9999, 0)", "os.close(fd)"]
)
def test_an_answer_that_spoils_its_report_fails_alone(code: str) -> None:
    """It is no error of ours, which would end the run that it is in."""
    spoils = f"import os\nfor fd in range(64):\n    try: {code}\n    except OSError: pass\n"
    for end in ("", "os._exit(0)"):
        assert run_tests([spoils + end], ["assert 0"]).error


def test_a_process_that_does_not_start_is_an_error_and_no_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.py").write_text("raise OSError('no memory left')")
    monkeypatch.setattr(sandbox, "_SCRIPT", tmp_path / "broken.py")
    with pytest.raises(PliantError, match="did not start: .*no memory left"):
        run_tests(["pass"], ["pass"])


def test_the_reason_that_it_did_not_start_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, tmp_path, "limit(request)", instead="{}['no limits']")
    with pytest.raises(PliantError, match="did not start: KeyError: 'no limits'"):
        run_tests(["pass"], ["pass"])


@pytest.mark.skipif("files" not in kernel_guards(), reason="the kernel lacks Landlock")
@pytest.mark.parametrize(
    ("call", "result"),
    [("_syscall(_LANDLOCK, 0, 0, 1)", "2"), ("_syscall(_LANDLOCK + 1, ruleset, 1, rule, 0)", "-1")],
)
def test_landlock_that_is_old_or_takes_no_rule_is_not_claimed(
    call: str, result: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, tmp_path, call, instead=result)
    assert "files" not in run_tests(["pass"], ["pass"]).guards


# --- what stays possible -------------------------------------------------------------------------

USUAL = {
    "modules": "import ctypes, decimal, heapq, multiprocessing, ssl, subprocess, typing, uuid",
    "classes": "import pickle\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n"
    "    x: int\nassert pickle.loads(pickle.dumps(A(2))) == A(2)",
    "asyncio": "import asyncio\nasync def f(): return 3\nassert asyncio.run(f()) == 3",
    "threads": "from concurrent.futures import ThreadPoolExecutor\n"
    "assert list(ThreadPoolExecutor(4).map(len, ['a', 'bb'])) == [1, 2]",
    "its own files": "import os, pathlib, shutil, tempfile\n"
    "with tempfile.TemporaryDirectory() as d:\n    os.makedirs(f'{d}/a/b')\n"
    "    pathlib.Path(d, 'a', 'c').write_text('x')\n    os.rename(f'{d}/a/c', f'{d}/a/b/c')\n"
    "    shutil.copytree(f'{d}/a', 'e')\nassert open('e/b/c').read() == 'x'\n"
    "assert os.path.realpath(os.path.expanduser('~')) == os.getcwd()\nopen(os.devnull, 'w')",
    "a database": "import sqlite3\nc = sqlite3.connect('a.db')\nc.execute('create table t (a)')\n"
    "c.commit()",
    "an alarm": "import signal\nrung = []\n"
    "signal.signal(signal.SIGALRM, lambda *a: rung.append(1))\n"
    "signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)\nwhile not rung: signal.pause()",
    "doctest": 'import doctest\ndef f():\n    """>>> f()\n    3\n    """\n    return 3\n'
    "assert doctest.testmod().attempted == 1",
    "its own state": "import os\nfor name in ('maps', 'status', 'cmdline'):\n"
    "    open(f'/proc/self/{name}').read()",
    "C libraries of packages": "from threadpoolctl import threadpool_info\nimport numpy\n"
    "assert threadpool_info()",
    "scikit-learn": "from sklearn.cluster import KMeans\n"
    "assert len(KMeans(2, n_init=1).fit([[0.0], [1.0]]).labels_) == 2",
    "torch": "import torch\nassert torch.ones(2).sum() == 2",
    "time zones": "import zoneinfo\nzoneinfo.available_timezones()",
}  # fmt: skip


MOCKS = """from unittest import mock
with mock.patch("builtins.input", return_value="3"), mock.patch("builtins.print") as shown:
    f()
shown.assert_called_once_with("3")
with mock.patch("builtins.open", mock.mock_open(read_data="x")):
    assert g() == "x"
"""


def test_a_test_mocks_what_the_answer_calls() -> None:
    answer = "def f(): print(input())\ndef g(): return open('/nowhere').read()"
    outcome = run_tests([answer], [MOCKS, MOCKS])
    assert outcome, outcome.error


@pytest.mark.parametrize("right", [True, False])
def test_a_test_case_of_an_earlier_test_runs_in_a_later_one(right: bool) -> None:
    case = "import unittest\nclass T(unittest.TestCase):\n    def test(self): self.assertTrue(f())"
    runs = (
        "import unittest\ncases = unittest.defaultTestLoader.loadTestsFromModule("
        "__import__('__main__'))\nassert unittest.TextTestRunner().run(cases).wasSuccessful()"
    )
    assert bool(run_tests([f"def f(): return {right}"], [case, runs])) == right


@pytest.mark.parametrize("use", USUAL)
def test_the_usual_works(use: str) -> None:
    if "/proc" in USUAL[use] and not Path("/proc/self/maps").exists():
        pytest.skip("the system has no /proc")
    outcome = run_tests([USUAL[use]], ["assert True"], seconds=60, memory_mb=4096)
    assert outcome, outcome.error


def test_packages_installed_from_their_folder_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As setuptools installs them: by a finder with a table, and not by a line of sys.path."""
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "editable.py").write_text("x = 3")
    finder = (
        "import sys, types\nfinder = types.ModuleType('__editable___x_finder')\n"
        f"finder.MAPPING = {{'editable': {str(tmp_path / 'source' / 'editable')!r}}}\n"
        "sys.modules[finder.__name__] = finder\n"
        "sys.meta_path.append(type('F', (), {'__module__': finder.__name__, 'find_spec': "
        "staticmethod(lambda *a: None)}))\n"
    )
    start = 'if __name__ == "__main__":\n'
    script = sandbox._SCRIPT.read_text().replace(start, finder + start)
    (tmp_path / "script.py").write_text(script)
    monkeypatch.setattr(sandbox, "_SCRIPT", tmp_path / "script.py")
    code = f"exec(open({str(tmp_path / 'source' / 'editable.py')!r}).read())\nassert x == 3"
    outcome = run_tests([code], ["pass"])
    assert outcome, outcome.error


def test_its_folder_is_deleted_and_our_secrets_are_not_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    code = "import os\nopen('x', 'w').write('x')\nraise ValueError(f'{os.getcwd()} {os.environ}')"
    error = run_tests([code], ["pass"]).error
    folder = error.removeprefix("ValueError: ").split()[0]
    assert "pliant-answer-" in folder and not os.path.exists(folder)
    assert run_tests(["import os"], ["assert 'sesame' not in str(os.environ)"])


def nobody_stands_in(folder: str) -> bool:
    """No process does, once those that were killed have died."""
    for _ in range(500):
        if not any(folder in cwd(process) for process in Path("/proc").glob("[0-9]*")):
            return True
        threading.Event().wait(0.01)
    return False


def cwd(process: Path) -> str:
    try:
        return os.readlink(process / "cwd")
    except OSError:
        return ""
