"""`python -m pliant.structure`: one row a model, and exit code 2 if one of them fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.structure.models import saved

from pliant.cli.app import run_program
from pliant.structure.__main__ import structure


def run(*arguments: str) -> int:
    try:
        run_program(structure, "python -m pliant.structure", arguments)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.mark.parametrize("strategy", ["random", "magnitude", "entropy"])
def test_a_row_for_each_model(strategy: str, tmp_path: Path, capsys: Any) -> None:
    bloom = str(saved("bloom", tmp_path))
    assert run("nano-s", bloom, "--strategy", strategy, "--max_length", "22") == 0
    out, err = capsys.readouterr()
    title, head, *rows = out.splitlines()
    assert title == f"Generation with 50% of the heads pruned ({strategy})"
    assert head.split()[:2] == ["architecture", "model"] and "identical at gates 1" in head
    assert rows[0].split()[:3] == ["Llama", "nano-s", "9"] and rows[0].count("yes") == 4
    assert rows[1].split()[:3] == ["Bloom", bloom, "8"] and rows[1].count("yes") == 4
    assert "nano-s, pruned: The future of AI is" in out and "models: 2 of 2" in err


def test_a_model_that_cannot_be_loaded_is_a_row_with_its_reason(capsys: Any) -> None:
    assert run("nano-x", "nano-s", "--json") == 2
    out, err = capsys.readouterr()
    broken, works = json.loads(out)
    assert not broken["ok"] and "no such embedded model" in broken["reason"]
    assert works["ok"] and works["reason"] == ""
    assert err.endswith("error: 1 of 2 models failed: nano-x\n")
    assert run("nano-x") == 2
    assert "no such embedded model" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["nano-s", "--pruning", "1.5"], "pruning = 1.5"),
        (["nano-s", "--strategy", "best"], "best"),
        ([], "MODEL"),
    ],
)
def test_what_is_wrong_is_one_line(flags: list[str], message: str, capsys: Any) -> None:
    assert run(*flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
