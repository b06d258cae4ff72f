"""`pliant importance`: a table, a file, a picture, and one line for a mistake."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pliant.cli import app
from pliant.structure import Importance


def outcome(*words: str) -> int:
    return app.outcome(["importance", *words])


def test_a_file_a_picture_and_a_document(tmp_path: Path, capsys: Any) -> None:
    out, picture = tmp_path / "new" / "scores.json", tmp_path / "heat.svg"
    words = ["nano-s", "--units", "heads", "--units", "layers", "--tokens", "300", "--json"]
    assert outcome(*words, "--out", str(out), "--picture", str(picture)) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads(out.read_text())
    assert document["model"] == "nano-s" and document["data"] == "nano"
    scores = Importance.from_dict(document)
    assert scores["heads", 2].shape == (3,) and scores["layers", 0].item() > 0
    svg = picture.read_text()
    assert svg.count("<image") >= 2 and ">heads<" in svg and ">layers<" in svg
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["heat.svg", "scores.json"]


def test_a_table_for_people(tmp_path: Path, capsys: Any) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("Sort: pear apple fig. The answer is apple fig pear. " * 20)
    words = ["nano-s", "--data", str(text), "--tokens", "200", "--length", "40"]
    assert outcome(*words, "--units", "channels", "--units", "heads", "--score", "activation") == 0
    printed, progress = capsys.readouterr()
    lines = printed.splitlines()
    assert lines[0] == "channels by activation"
    assert lines[1].split() == ["layer", "units", "mean", "lowest", "highest"]
    assert lines[2].split()[:2] == ["0", "128"] and "(unit " in lines[2]
    assert "activation on " in lines[-1] and "ranks 384 channels, from channel " in lines[-1]
    assert "activation: 1/1" in progress


def test_leaving_one_out_is_resumed(tmp_path: Path, capsys: Any) -> None:
    notes = tmp_path / "units.jsonl"
    words = ["nano-s", "--score", "leave_one_out", "--tokens", "100", "--json"]
    forwards = []
    for _ in range(2):
        assert outcome(*words, "--resume", str(notes)) == 0
        forwards.append(json.loads(capsys.readouterr().out)["cost"]["forwards"])
    assert forwards == [10, 1]


def test_scores_without_text_need_none(capsys: Any) -> None:
    for score in ("magnitude", "random"):
        assert outcome("nano-s", "--score", score, "--json") == 0
        document = json.loads(capsys.readouterr().out)
        assert document["data"] is None and document["tokens"] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nano-s", "--units", "toes"], "'toes' is not one of 'heads'"),
        (["nano-s", "--units", "layers", "--score", "entropy"], "for layers give one of fisher"),
        (["nano-s", "--units", "heads", "--units", "heads"], "'heads' repeats"),
        (["nano-s", "--units", "experts"], "has no experts to gate"),
        (["nano-s", "--data", "FOLDER/short.txt"], "too short"),
        (["nano-s", "--data", "FOLDER/none.txt"], "there is no such file"),
        (["nano-s", "--resume", "FOLDER/r.jsonl"], "only leave_one_out can be resumed"),
        (["nano-s", "--out", "FOLDER/scores.txt"], "name a .json file"),
        (["nano-s", "--picture", "heat.png"], "name a .svg file"),
        (["FOLDER", "--score", "fisher"], "calibration text is needed: --data"),
        (["./nowhere", "--data", "nano"], "no such folder"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    words: list[str], message: str, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "short.txt").write_text("a short text")
    before = sorted(tmp_path.iterdir())
    assert outcome(*(word.replace("FOLDER", str(tmp_path)) for word in words)) == 2
    printed, complained = capsys.readouterr()
    assert printed == "" and message in complained
    assert len(complained.splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == before
