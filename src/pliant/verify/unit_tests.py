"""The verifier that runs an answer's code with unit tests, HumanEval's format among them."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from pliant.errors import InvalidInput, check_whole
from pliant.verify.sandbox import TestRun, run_tests
from pliant.verify.text import as_text

_FENCE = re.compile(
    r"^[ \t]*(?:```|~~~)[ \t]*(?P<tag>[\w+.-]*)[^\n]*\n(?P<code>.*?)(?:^[ \t]*(?:```|~~~)|\Z)",
    re.MULTILINE | re.DOTALL,
)
_PYTHON = {"python", "python3", "py"}


@dataclass(frozen=True)
class UnitTests:
    """The answer's code passes the reference's tests, in a process with limits and no network.

    The reference is Python that raises if the code is wrong; or a list of such texts, all of which
    must pass; or a row with a `test`, as HumanEval has them: with an `entry_point`, `test` defines
    `check`, which gets that function. An answer is a fenced block, code, or the continuation of
    the row's `prompt` (else of the prompt).
    """

    name: ClassVar[str] = "unit_tests"
    row_columns: ClassVar[tuple[str, ...]] = ("test",)
    """A row with these columns is a reference by itself."""
    concurrent: ClassVar[bool] = True
    """Several answers may be verified at a time."""
    seconds: float = 10.0
    """The longest run of an answer, in processor time and by the clock."""
    memory_mb: int = 1024
    """The most memory of an answer."""
    file_mb: int = 16
    """The most that an answer may write, into a folder that is deleted afterwards."""
    partial: bool = False
    """Whether a list of tests gives the share that passes, instead of 1 if all pass and else 0."""

    def __post_init__(self) -> None:
        if not (0 < self.seconds < math.inf):
            raise InvalidInput(f"unit_tests: seconds={self.seconds}: give more than 0")
        check_whole("unit_tests: memory_mb", self.memory_mb, 32)
        check_whole("unit_tests: file_mb", self.file_mb, 1)

    def __call__(self, answer: str, reference: Any, prompt: str | None = None) -> float:
        outcome = self.run(answer, reference, prompt)
        if self.partial:
            return sum(outcome.passed) / len(outcome.passed)
        return float(bool(outcome))

    def run(self, answer: str, reference: Any, prompt: str | None = None) -> TestRun:
        """What each test says, and the first error."""
        tests, entry_point, code = _reference(reference)
        return run_tests(
            sources(as_text(answer), prompt if code is None else code, entry_point),
            tests,
            seconds=self.seconds,
            memory_mb=self.memory_mb,
            file_mb=self.file_mb,
            partial=self.partial,
        )


def _reference(reference: Any) -> tuple[list[str], str | None, str | None]:
    """The tests, the name of the function that they test, and the code that the answer goes on."""
    entry_point = code = None
    tests = reference
    if isinstance(reference, Mapping):
        tests, entry_point = reference.get("test"), reference.get("entry_point")
        code = reference.get("prompt") if isinstance(reference.get("prompt"), str) else None
    listed = [tests] if isinstance(tests, str) else tests
    if not isinstance(listed, (list, tuple)) or not listed:
        raise InvalidInput(f"unit_tests: there are no tests ({_short(reference)})")
    for test in listed:
        if not isinstance(test, str) or not test.strip():
            raise InvalidInput(f"unit_tests: a test is a text of Python, not {_short(test)}")
    if entry_point is None:
        return list(listed), None, code
    if not isinstance(entry_point, str) or not entry_point.isidentifier():
        raise InvalidInput(f"unit_tests: entry_point={entry_point!r} is no name of a function")
    return [f"{test}\n\ncheck({entry_point})\n" for test in listed], entry_point, code


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


# --- the code of an answer -----------------------------------------------------------------------


def sources(answer: str, prompt: str | None, entry_point: str | None) -> list[str]:
    """The ways to read an answer as a program, the likeliest first; which are Python, Python says.

    An answer that defines the entry point stands for itself, after the imports and helpers that
    come before it in the prompt; any other goes on where the prompt ends. What a model writes
    after the end of the function is left out if it is no Python.
    """
    blocks = _blocks(answer)
    texts = ["\n\n".join(blocks), *reversed(blocks)] if blocks else [answer]
    before = "" if prompt is None else "\n\n".join(_blocks(prompt)) or prompt
    whole, continued = [], []
    for text in texts:
        defined = entry_point is None or _defines(text, entry_point)
        if defined:
            whole += [f"{_head(before, entry_point)}\n{text}", text] if entry_point else [text]
        if before:
            body = textwrap.indent(textwrap.dedent(text), "    ")
            continued += [before + text, before + _indented_part(text), f"{before}\n{body}"]
    alone = [textwrap.dedent(text) for text in texts]
    return list(dict.fromkeys([*whole, *continued, *texts, *alone]))


def _blocks(text: str) -> list[str]:
    """The fenced blocks that are marked as Python, or else those without a mark."""
    fenced = [(match["tag"].lower(), match["code"]) for match in _FENCE.finditer(text)]
    marked = [code for tag, code in fenced if tag in _PYTHON]
    return marked or [code for tag, code in fenced if not tag]


def _defines(code: str, name: str) -> bool:
    return re.search(rf"^(?:(?:async +)?def|class) +{name}\b|^{name} *[:=]", code, re.M) is not None


def _head(code: str, entry_point: str | None) -> str:
    """What comes before the definition of the entry point."""
    match = re.search(rf"^(?:async +)?def +{entry_point}\b|^class +{entry_point}\b", code, re.M)
    return code[: match.start()] if match else ""


def _indented_part(text: str) -> str:
    """Up to the first line that is not indented: the end of the function that a prompt began."""
    first, *rest = text.splitlines(keepends=True) or [""]
    for i, line in enumerate(rest):
        if line.strip() and not line[0].isspace():
            return "".join([first, *rest[:i]])
    return text
