"""A checkpoint that a kill tore is never taken for a whole one, wherever the kill came."""

from __future__ import annotations

from pathlib import Path

import pytest

from pliant.gradients.runs.checkpoints import (
    checkpoints,
    clear_torn,
    is_complete,
    last_complete,
    mark,
)

FILES = ("model.safetensors", "optimizer.pt", "trainer_state.json", "adapters/x/pliant.json")


def checkpoint(folder: Path, step: int) -> Path:
    path = folder / f"checkpoint-{step}"
    for name in FILES:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(f"{name} at {step}")
    return path


def test_the_last_whole_one_is_found_by_its_step(tmp_path: Path) -> None:
    for step in (90, 100, 20):
        mark(checkpoint(tmp_path, step))
    checkpoint(tmp_path, 110)  # killed before its mark
    (tmp_path / "checkpoint-best").mkdir()
    assert last_complete(tmp_path) == tmp_path / "checkpoint-100"
    assert [path.name for path in checkpoints(tmp_path)][-1] == "checkpoint-110"
    assert clear_torn(tmp_path) == ["checkpoint-110"]
    assert not (tmp_path / "checkpoint-110").exists() and (tmp_path / "checkpoint-20").exists()


@pytest.mark.parametrize("name", FILES)
def test_one_that_lacks_a_file_or_its_end_is_torn(tmp_path: Path, name: str) -> None:
    path = checkpoint(tmp_path, 3)
    mark(path)
    assert is_complete(path)
    content = (path / name).read_bytes()
    (path / name).write_bytes(content[:-1])
    assert not is_complete(path) and last_complete(tmp_path) is None
    (path / name).write_bytes(content)
    assert is_complete(path)
    (path / name).unlink()  # as when it is being removed to make room
    assert not is_complete(path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"files": 3}'])
def test_a_mark_that_is_torn_itself_marks_nothing(tmp_path: Path, content: str) -> None:
    path = checkpoint(tmp_path, 3)
    mark(path)
    (path / "complete.json").write_text(content)
    assert not is_complete(path)


def test_none_is_found_where_there_is_none(tmp_path: Path) -> None:
    assert last_complete(tmp_path) is None and clear_torn(tmp_path / "nowhere") == []
