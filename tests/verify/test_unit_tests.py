"""Unit tests: right code passes, and nothing else does, whatever it tries."""

from __future__ import annotations

import pytest

from pliant.errors import InvalidInput
from pliant.verify import UnitTests, verifier
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


def test_each_way_to_read_an_answer_is_tried_once() -> None:
    ways = sources("return 1", "def f():\n", "f")
    assert len(ways) == len(set(ways))
    assert "def f():\n\n    return 1" in ways
