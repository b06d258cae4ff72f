"""Two processes are started once more if a signal ended one of them, without what they had left."""

from __future__ import annotations

from pathlib import Path

from tests.processes import run_two


def test_a_crash_is_tried_once_more(tmp_path: Path, root: Path) -> None:
    (folder := tmp_path / "out").mkdir()
    printed = run_two("tests.crashes_once", str(tmp_path / "marker"), str(folder), cwd=root)
    assert printed == ["[]\n", "[]\n"] and (tmp_path / "marker").exists()
