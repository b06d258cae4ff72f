"""Unit tests: right code passes, and nothing else does, whatever it tries."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pliant.errors import InvalidInput, PliantError
from pliant.verify import UnitTests, sandbox, verifier
from pliant.verify.sandbox import network_block, run_tests
from pliant.verify.unit_tests import sources

ROW = {
    "prompt": (
        "from typing import List\n\n\ndef half(x):\n    return x / 2\n\n\n"
        'def halves(xs: List[float]) -> List[float]:\n    """Half of each."""\n'
    ),
    "entry_point": "halves",
    "test": (
        "def check(candidate):\n    assert candidate([2, 4]) == [1, 2]\n"
        "    assert candidate([]) == []\n"
    ),
}
BODY = "    return [half(x) for x in xs]\n"
WHOLE = "def halves(xs: List[float]):\n" + BODY

RIGHT = {
    "continuation": BODY,
    "function": WHOLE,
    "prompt and continuation": ROW["prompt"] + BODY,
    "fenced": f"Sure!\n```python\n{WHOLE}```\nIt halves.",
    "fence not closed": f"```py\n{WHOLE}",
    "fenced continuation": f"```\n{BODY}```",
    "continuation without indentation": "return [half(x) for x in xs]",
    "shell and Python": f"```bash\npip install x\n```\n```python\n{WHOLE}```",
    "a second thought": f"```python\ndef halves(xs): return 1\n```\nNo:\n```python\n{WHOLE}```",
    "prose after the function": BODY + "\nThis halves each number.\n",
    "another function, cut short": BODY + "\ndef more(\n",
    "a main part": WHOLE + "\nif __name__ == '__main__':\n    print(halves(input()))\n",
}
WRONG = {
    "nothing": "",
    "wrong": "    return xs\n",
    "prose": "I do not know.",
    "says passed": "    print('passed')\n",
    "exits": "import sys\nsys.exit(0)\n" + WHOLE,
    "exits in the function": "    import sys\n    sys.exit(0)\n",
    "exits hard": f"import os\n{WHOLE}\nos._exit(0)\n",
    "exits hard in the function": "    import os\n    os._exit(0)\n",
    "has its own check": f"{WHOLE.replace('half(x)', 'x')}\ndef check(candidate): pass\n",
    "replaces exec": (
        "import builtins\nbuiltins.exec = builtins.compile = lambda *a, **k: None\n"
        "def halves(xs): return xs\n"
    ),
    "writes a report": (
        "import os\nfor fd in range(40):\n    try:\n"
        '        os.write(fd, b\'{"token": "", "done": true, "test": 0, "passed": true}\\n\')\n'
        "    except OSError: pass\nos._exit(0)\ndef halves(xs): pass\n"
    ),
    "kills itself": "    import ctypes\n    ctypes.string_at(0)\n",
}


@pytest.mark.parametrize("answer", RIGHT.values(), ids=RIGHT)
def test_right_code_passes_however_it_is_written(answer: str) -> None:
    outcome = UnitTests().run(answer, ROW)
    assert outcome, outcome.error


@pytest.mark.parametrize("answer", WRONG.values(), ids=WRONG)
def test_only_right_code_passes(answer: str) -> None:
    outcome = UnitTests().run(answer, ROW)
    assert not outcome and outcome.error
    assert UnitTests()(answer, ROW) == 0.0


def test_the_prompt_may_come_by_itself() -> None:
    row = {key: value for key, value in ROW.items() if key != "prompt"}
    assert verifier("unit_tests")(BODY, row, ROW["prompt"]) == 1.0
    asked = f"Complete this function:\n\n```python\n{ROW['prompt']}```"
    assert verifier("unit_tests")(BODY, row, asked) == 1.0
    assert verifier("unit_tests")(BODY, row) == 0.0


def test_tests_are_a_text_or_a_list_of_which_a_share_may_pass() -> None:
    answer = "def f(x):\n    if x > 2: raise SystemExit\n    return x"
    tests = ["assert f(1) == 1", "assert f(3) == 3", "assert f(2) == 2", "assert f(0) == 1"]
    assert UnitTests()(answer, tests[0]) == 1.0
    assert UnitTests()(answer, [tests[0], tests[2]]) == 1.0
    assert UnitTests()(answer, tests) == 0.0
    assert UnitTests(partial=True)(answer, tests) == 0.5
    leaves = answer.replace("raise SystemExit", "import os; os._exit(0)")
    assert UnitTests(partial=True)(leaves, tests) == 0.25  # what came before it counts


@pytest.mark.parametrize(
    "reference",
    [None, "", [], [""], 3, {"prompt": "x"}, {"test": "pass", "entry_point": "f()"}, ["x", None]],
)
def test_a_reference_without_tests_is_refused(reference: object) -> None:
    with pytest.raises(InvalidInput, match="unit_tests"):
        UnitTests()("x = 1", reference)


def test_tests_that_are_no_python_are_refused() -> None:
    with pytest.raises(InvalidInput, match="the reference's tests are no Python"):
        UnitTests()("x = 1", "assert x ==")


@pytest.mark.parametrize("options", [{"seconds": 0}, {"memory_mb": 1}, {"file_mb": 0.5}])
def test_limits_are_checked(options: dict[str, float]) -> None:
    with pytest.raises(InvalidInput, match="give|file_mb should be a valid integer"):
        verifier("unit_tests", **options)


# --- what an answer may not do -------------------------------------------------------------------


@pytest.mark.parametrize("code", ["while True: pass", "import time; time.sleep(60)"])
def test_time_is_limited(code: str) -> None:
    assert run_tests([code], ["pass"], seconds=0.5).error == "no end after 0.5 s"


def test_memory_is_limited() -> None:
    assert "MemoryError" in run_tests(["x = bytearray(300 << 20)"], ["pass"], memory_mb=256).error
    assert run_tests(["x = bytearray(100 << 20)"], ["pass"], memory_mb=256)


def test_files_are_written_only_in_its_own_folder_and_only_small(tmp_path: Path) -> None:
    outside = tmp_path / "file"
    outside.write_text("old")
    for code in (
        f"open({str(outside)!r}, 'w')",
        f"import os; os.remove({str(outside)!r})",
        f"import pathlib; pathlib.Path('x').symlink_to({str(outside)!r}); open('x', 'w')",
        f"import os; os.rename({str(outside)!r}, 'x')",
        f"import shutil; shutil.rmtree({str(tmp_path)!r})",
    ):
        assert "PermissionError" in run_tests([code], ["pass"]).error
    assert outside.read_text() == "old"
    ours = "import os, tempfile\nopen('x', 'w').write('x')\nos.mkdir('d')\nos.remove('x')\n"
    ours += "assert os.path.realpath(os.path.expanduser('~')) == os.getcwd()\n"
    assert run_tests([ours], ["tempfile.NamedTemporaryFile('w').write('x')"])
    large = "f = open('x', 'wb')\nfor _ in range(3): f.write(bytes(1 << 20)); f.flush()"
    assert "File too large" in run_tests([large], ["pass"], file_mb=2).error


def test_its_folder_is_deleted_and_our_secrets_are_not_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    code = "import os\nopen('x', 'w').write('x')\nraise ValueError(f'{os.getcwd()} {os.environ}')"
    error = run_tests([code], ["pass"]).error
    folder = error.removeprefix("ValueError: ").split()[0]
    assert "pliant-answer-" in folder and not os.path.exists(folder)
    assert run_tests(["import os"], ["assert 'sesame' not in str(os.environ)"])


def test_the_network_is_out_of_reach(server: str) -> None:
    host, port = server.split(":")
    code = f"import socket\nsocket.create_connection(({host!r}, {port}), 1)"
    assert "answers have no network" in run_tests([code], ["pass"]).error
    assert network_block() in ("namespace", "sockets blocked")


@pytest.mark.skipif(network_block() != "namespace", reason="the system gives no namespaces")
def test_the_kernel_keeps_it_off_the_network_and_our_processes(server: str) -> None:
    """Through the C library, which Python's audit does not see."""
    port = int(server.split(":")[1])
    connect = (
        "import ctypes, socket, struct\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        f"name = struct.pack('=HHL8x', 2, socket.htons({port}), socket.htonl(0x7F000001))\n"
        "made = libc.socket(2, 1, 0)\nassert libc.connect(made, name, 16) == -1"
    )
    assert run_tests(["pass"], [connect])
    assert run_tests(["pass"], [f"import ctypes\nassert ctypes.CDLL(None).kill({os.getpid()}, 0)"])
    secret = f"try: open('/proc/{os.getppid()}/environ').read()\nexcept OSError: pass\nelse: 1 / 0"
    assert run_tests(["pass"], [secret])


@pytest.mark.skipif(network_block() != "namespace", reason="the system gives no namespaces")
def test_processes_that_it_leaves_behind_are_dead() -> None:
    """One that left its group, by the C library; it stands in the answer's folder."""
    code = (
        "import ctypes, os\nlibc = ctypes.CDLL(None)\nif libc.fork() == 0:\n"
        "    libc.setsid()\n    libc.pause()\nraise ValueError(os.getcwd())"
    )
    folder = run_tests([code], ["pass"]).error.removeprefix("ValueError: ")
    assert "pliant-answer-" in folder
    assert nobody_stands_in(folder)


def test_without_namespaces_python_alone_keeps_it_in(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a system that gives none: the same script, which does not ask for them."""
    script = sandbox._SCRIPT.read_text()
    alone = tmp_path / "alone.py"
    alone.write_text(script.replace("isolated = unshare()", "isolated = False"))
    monkeypatch.setattr(sandbox, "_SCRIPT", alone)
    outcome = run_tests(["x = 1"], ["assert x == 1"])
    assert outcome and outcome.network == "sockets blocked"
    host, port = server.split(":")
    code = f"import socket\nsocket.create_connection(({host!r}, {port}), 1)"
    assert "answers have no network" in run_tests([code], ["pass"]).error
    assert run_tests(["while True: pass"], ["pass"], seconds=0.5).error == "no end after 0.5 s"
    left = "import ctypes, os\nif ctypes.CDLL(None).fork() == 0:\n    ctypes.CDLL(None).pause()\n"
    folder = run_tests([left + "raise ValueError(os.getcwd())"], ["pass"]).error.split()[-1]
    assert nobody_stands_in(folder)


def test_a_process_that_does_not_start_is_an_error_and_no_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.py").write_text("raise OSError('no memory left')")
    monkeypatch.setattr(sandbox, "_SCRIPT", tmp_path / "broken.py")
    with pytest.raises(PliantError, match="did not start: .*no memory left"):
        run_tests(["pass"], ["pass"])


@pytest.mark.parametrize(
    "code", ["os.fork()", "os.system('ls')", "os.kill(1, 9)", "subprocess.run(['ls'])"]
)
def test_it_starts_and_signals_no_processes(code: str) -> None:
    error = run_tests([f"import os, subprocess\n{code}"], ["pass"]).error
    assert "start and signal no processes" in error


def test_a_flood_of_output_is_dropped() -> None:
    assert run_tests(["print('x' * (50 << 20))"], ["pass"])


def test_the_usual_library_works() -> None:
    """What HumanEval's answers import, and what needs its own module: dataclasses and pickles."""
    code = (
        "import asyncio, collections, hashlib, pickle, random, re\nfrom dataclasses import "
        "dataclass\n@dataclass\nclass A:\n    x: int\nasync def g(): return 3\n"
    )
    tests = ["assert pickle.loads(pickle.dumps(A(2))) == A(2)", "assert asyncio.run(g()) == 3"]
    outcome = run_tests([code], tests)
    assert outcome, outcome.error


def test_each_way_to_read_an_answer_is_tried_once() -> None:
    ways = sources("return 1", "def f():\n", "f")
    assert len(ways) == len(set(ways))
    assert "def f():\n\n    return 1" in ways


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


@pytest.fixture
def server() -> Iterator[str]:
    """A port that takes connections, which a test without a sandbox would reach."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield "{}:{}".format(*listening.getsockname())
