"""A note of where a base was loaded from: private, and never needed."""

from __future__ import annotations

import stat
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from tests.minimal_adapter import tiny_llama

from pliant.adapters import fingerprint
from pliant.adapters.local_bases import note_place, noted_place


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PLIANT_BASES", str(tmp_path / "notes"))
    (tmp_path / "bäse").mkdir()
    (tmp_path / "bäse" / "config.json").write_text("{}")
    return tmp_path / "bäse"


def test_a_note_is_private_and_holds_while_the_folder_is_there(base: Path) -> None:
    own, other = (asdict(fingerprint(tiny_llama(seed=seed))) for seed in (0, 1))
    note_place(own, base)
    assert noted_place(own) == str(base) and noted_place(other) == ""
    (note,) = (base.parent / "notes").rglob("*.txt")
    assert stat.S_IMODE(note.stat().st_mode) == 0o600
    base.rename(base.parent / "moved")
    assert noted_place(own) == ""


def test_a_lora_is_loaded_as_a_base_and_noted_as_one(base: Path) -> None:
    (base / "config.json").rename(base / "adapter_config.json")
    own = asdict(fingerprint(tiny_llama()))
    note_place(own, base)
    assert noted_place(own) == str(base)


def test_only_bases_without_a_name_are_noted_whose_values_are_known(base: Path) -> None:
    own = fingerprint(tiny_llama())
    for known in (replace(own, name="somebody/llama"), replace(own, samples={}, why="quantised")):
        note_place(asdict(known), base)
    for nowhere in (None, "", base / "nothing", "somebody/llama"):
        note_place(asdict(own), nowhere)
    assert not (base.parent / "notes").exists()


def test_a_cache_that_cannot_be_written_is_no_error(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLIANT_BASES", str(base / "config.json"))
    own = asdict(fingerprint(tiny_llama()))
    note_place(own, base)
    assert noted_place(own) == ""
