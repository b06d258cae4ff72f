"""A file is replaced as a whole or not at all, and what is no file of ours stays as it is."""

from __future__ import annotations

import gzip
import os
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.minimal_adapter import Scale, ScaleConfig, tiny_llama, trained

from pliant.adapters import attach
from pliant.data import read_rows, write_rows
from pliant.errors import InvalidInput
from pliant.files import (
    check_new,
    check_ours,
    check_writable,
    leftovers,
    new_folder,
    replacing,
    write_file,
)
from pliant.reports import page

ROWS = [{"prompt": "a\nb", "answer": "é"}]


def write_page(path: Path) -> None:
    page.check_writable(path)
    page.write(path, "Title", [page.Section("Section", ["sentence"])])


def write_table(path: Path) -> None:
    write_rows(path, ROWS)


WRITERS = {"page": (write_page, "page.html"), "table": (write_table, "table.jsonl")}
each_writer = pytest.mark.parametrize("writer", WRITERS)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@each_writer
def test_a_symbolic_link_is_followed(tmp_path: Path, writer: str) -> None:
    write, name = WRITERS[writer]
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / name
    link.symlink_to(tmp_path / "elsewhere" / "target")
    for _ in range(2):  # the link dangles at first
        write(link)
        assert link.is_symlink() and (tmp_path / "elsewhere" / "target").stat().st_size
    assert {path.name for path in tmp_path.rglob("*")} == {"elsewhere", "target", name}


def test_no_place_for_a_new_folder_is_said_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidInput, match="the folder that you are in"):
        check_new(Path("."))
    with pytest.raises(InvalidInput, match="the root of the file system"):
        check_writable(Path("/."))


@each_writer
def test_a_pipe_is_written_to(tmp_path: Path, writer: str) -> None:
    write, name = WRITERS[writer]
    os.mkfifo(tmp_path / name)
    with ThreadPoolExecutor(1) as pool:
        content = pool.submit((tmp_path / name).read_bytes)
        write(tmp_path / name)
    (tmp_path / "file").mkdir()
    write(tmp_path / "file" / name)
    assert content.result() == (tmp_path / "file" / name).read_bytes()
    assert stat.S_ISFIFO((tmp_path / name).stat().st_mode)


def test_a_device_is_written_to() -> None:
    check_writable(Path("/dev/null"))
    write_file(Path("/dev/null"), b"text")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_permissions_stay_and_a_private_file_is_its_owners(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_rows(path, ROWS, private=True)
    assert mode_of(path) == 0o600
    write_rows(path, ROWS)
    assert mode_of(path) == 0o600
    path.chmod(0o640)
    write_rows(path, ROWS, private=True)
    assert mode_of(path) == 0o640


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.csv", "rows.csv.gz"])
def test_rows_are_written_in_every_format(tmp_path: Path, name: str) -> None:
    assert write_rows(tmp_path / name, ROWS) == 1
    assert read_rows(tmp_path / name) == ROWS
    if name.endswith(".gz"):
        assert gzip.decompress((tmp_path / name).read_bytes()).decode().endswith("\n")


def test_an_error_in_the_middle_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), replacing(path) as file:
        file.write(b"new")
        _ = 1 / 0
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "folder") as folder:
        (folder / "file").touch()
        _ = 1 / 0
    assert path.read_bytes() == b"old" and [each.name for each in tmp_path.iterdir()] == ["file"]


def test_writers_of_one_name_do_not_meet(tmp_path: Path) -> None:
    """Also where both have begun before either is done."""
    path, both = tmp_path / ("long" * 60), threading.Barrier(2)

    def write(content: bytes) -> None:
        with replacing(path) as file:
            both.wait(timeout=20)
            file.write(content)
            both.wait(timeout=20)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, (b"1" * 1000, b"2" * 1000)))
    assert path.read_bytes() in (b"1" * 1000, b"2" * 1000) and not leftovers(path)


def test_two_jobs_save_into_one_adapter_folder(tmp_path: Path) -> None:
    """And a third one reads it all the time: always all of one save."""
    adapters = []
    for seed in (2, 3):
        model = tiny_llama()
        adapters.append(trained(attach(model, Scale(model, ScaleConfig())), seed))
    adapters[0].save_pretrained(tmp_path)
    done = threading.Event()

    def save(adapter: Scale) -> None:
        for _ in range(25):
            adapter.save_pretrained(tmp_path)

    def read() -> int:
        model, reads = tiny_llama(), 0
        while not done.is_set() or not reads:
            again = Scale.from_pretrained(model, tmp_path)
            assert any((again.embeddings == each.embeddings).all() for each in adapters)
            again.detach()
            reads += 1
        return reads

    with ThreadPoolExecutor(3) as pool:
        reading = pool.submit(read)
        try:
            list(pool.map(save, adapters))
        finally:
            done.set()
        assert reading.result() > 0
    assert len(list(tmp_path.iterdir())) == 3  # index, weights and card: nothing unfinished


@pytest.mark.parametrize("content", [b"", b"<!doctype html>\n<p>"])
def test_a_page_replaces_an_older_page(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "page.html").write_bytes(content)
    write_page(tmp_path / "page.html")


def test_a_page_replaces_nothing_else(tmp_path: Path) -> None:
    labels = tmp_path / "labels.jsonl"
    labels.write_text('{"prompt": "a"}\n')
    with pytest.raises(InvalidInput, match="holds something else, which would be lost"):
        page.check_writable(labels)
    with pytest.raises(InvalidInput, match="holds something else"):
        check_ours(labels, b"<?xml", b"<svg")
    assert labels.read_text() == '{"prompt": "a"}\n'
