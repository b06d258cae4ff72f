"""Importing pliant, asking for help and mistyping a flag import none of the heavy libraries."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import pliant

HEAVY = (
    "torch",
    "transformers",
    "peft",
    "datasets",
    "sklearn",
    "matplotlib",
    "accelerate",
    "numpy",
)

REPORT = f"""
import sys
heavy = [name for name in {HEAVY!r} if name in sys.modules]
sys.stderr.write("HEAVY " + " ".join(heavy))
"""


def heavy_after(code: str) -> list[str]:
    """The heavy libraries that are imported once the code has run in a fresh interpreter."""
    program = f"try:\n    {code}\nexcept SystemExit:\n    pass\n{REPORT}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr.rpartition("HEAVY ")[2].split()


def test_importing_pliant_is_light() -> None:
    assert heavy_after("import pliant; dir(pliant); pliant.PliantError") == []


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--help"],
        ["--version"],
        ["--wrong"],
        ["no-such-command"],
        ["doctor", "--help"],
        ["doctor", "--wrong"],
        ["doctor"],
        ["demo", "--help"],
        ["route"],
        ["route", "--help"],
        ["route", "--wrong"],
        ["route", "ask", "--help"],
        ["route", "label", "--help"],
        ["route", "label", "--wrong"],
        ["run", "--help"],
        ["run", "no-such-recipe.yaml"],
        ["doctor", "./no-such-folder"],
        ["score", "--help"],
        ["score", "./no-such-folder", "a prompt"],
    ],
    ids=" ".join,
)
def test_the_command_line_answers_without_heavy_libraries(arguments: list[str]) -> None:
    assert heavy_after(f"from pliant.cli import main; main({arguments!r})") == []


def test_the_look_at_imported_modules_can_fail() -> None:
    assert heavy_after("import numpy") == ["numpy"]


@pytest.mark.parametrize("name", pliant.__all__)
def test_each_public_name_is_there(name: str) -> None:
    assert getattr(pliant, name) is not None
    assert name in dir(pliant)


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(pliant.__file__).read_text(encoding="utf-8"))
    block = next(
        node
        for node in tree.body
        if isinstance(node, ast.If)
        and isinstance(node.test, ast.Name)
        and node.test.id == "TYPE_CHECKING"
    )
    seen = {
        (alias.asname or alias.name, statement.module)
        for statement in block.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    assert seen == set(pliant._HOME_OF.items())


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="Anatomyy"):
        _ = pliant.Anatomyy
