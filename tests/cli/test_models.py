"""`pliant models`: a catalogue that fetches nothing unless asked, and says what to type."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pliant.cli import app
from pliant.loading import catalogue


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PLIANT_MODELS", str(tmp_path / "models"))
    return tmp_path / "models"


def pretend(home: Path, name: str) -> Path:
    """A folder that looks like a fetched model to the catalogue."""
    folder = home / name
    folder.mkdir(parents=True)
    (folder / catalogue.RECORD).write_text('{"files": {"config.json": ""}}')
    (folder / "config.json").write_text("{}")
    return folder


def test_the_list_names_sizes_licenses_and_homes(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend(home, "minilm")
    assert app.outcome(["models", "list"]) == 0
    printed = capsys.readouterr().out.splitlines()
    lines = {name: line for name in catalogue.CATALOGUE for line in printed if name in line}
    assert set(lines) == set(catalogue.CATALOGUE)
    assert "92.9 MB" in lines["smollm2-135m"] and "Apache-2.0" in lines["smollm2-135m"]
    assert lines["smollm2-135m"].endswith("no") and lines["minilm"].endswith("yes")


def test_machines_get_the_folder_of_what_is_here(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = pretend(home, "minilm")
    assert app.outcome(["models", "list", "--json"]) == 0
    entries = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert entries["minilm"]["folder"] == str(folder)
    assert entries["smollm2-135m"]["folder"] is None
    assert entries["smollm2-135m"]["bytes"] == 92_871_040


def test_the_path_is_all_that_is_printed(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = pretend(home, "minilm")
    assert app.outcome(["models", "path", "minilm"]) == 0
    assert capsys.readouterr().out == f"{folder}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["path", "smollm2-135m"], "pliant models get smollm2-135m (93 MB)"),
        (["remove", "smollm2-135m"], "there is nothing to remove"),
        (["path", "smolm2-135m"], "did you mean 'smollm2-135m'?"),
        (["get", "minilm", "minlm"], "did you mean 'minilm'?"),
        (["get"], "Missing argument 'names'"),
        (["get", "minilm", "--source", "web"], "web"),
    ],
)
def test_what_is_wrong_is_one_line(
    home: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert app.outcome(["models", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not home.exists()


def test_what_is_here_is_not_fetched_again(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = pretend(home, "minilm")
    assert app.outcome(["models", "get", "minilm"]) == 0
    assert capsys.readouterr().out == f"minilm is in {folder}\n"


def test_removing_says_what_was_freed(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = pretend(home, "minilm")
    assert app.outcome(["models", "remove", "minilm"]) == 0
    assert not folder.exists() and capsys.readouterr().out == "removed minilm: 32 B freed\n"


def test_every_command_names_the_missing_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.outcome(["doctor", "smollm2-135m"]) == 2
    assert "pliant models get smollm2-135m" in capsys.readouterr().err


def test_terms_of_use_are_shown_before_fetching(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pliant.loading.fetch.fetch", lambda name, *_: home / name)
    assert app.outcome(["models", "get", "gemma3-270m"]) == 0
    notice, result = capsys.readouterr().out.splitlines()
    assert "Gemma Terms of Use" in notice and result.startswith("gemma3-270m is in")
