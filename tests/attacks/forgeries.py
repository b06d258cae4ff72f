"""Saved files that somebody else has edited: every field odd, every header a lie."""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import os
import pickle
import random
import shutil
import sqlite3
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.attacks import workplace
from tests.attacks.judged import Tally, fault, not_finite, not_right
from tests.attacks.seals import Files, resealed, wrong_tensors
from tests.attacks.worker import Done, Worker
from tests.attacks.workplace import Workplace

ODD: list[Any] = [None, True, -1, 10**9, 10**30, 0.5, float("nan"), float("inf"), "", "x", "\ud800"]
ODD += [
    [],
    {},
    [[]],
    "../../theirs",
    "/etc/passwd",
    "a\0b",
    {"a": 1},
    [None],
    "nonesuch:f",
    10**400,
]
DEEP = b"[" * 100_000
GONE = object()


@dataclass(frozen=True)
class Target:
    """A saved file, and a command that reads it."""

    path: str
    """In the workplace's `ours`; a pattern."""
    words: str


SCORE = "score ../ours/scorer 2+2"
ASK = "route ask --router ../ours/router 2+2 --max-new-tokens 2"
REPORT = "route report --router ../ours/router --labels ../data/labels.jsonl --out report.html"
LEARN = "route learn --router ../ours/router"
EXPERT_ASK = "expert ask --experts ../ours/experts 2+2 --max-new-tokens 2"
MERGE = "expert merge ../ours/experts/words --out new"
EXPORT = "export nano-s --adapters ../ours/gates --out new"
RECOVER = """recover ../ours/model --teacher nano-s --data ../data/few.jsonl --length 32 --out new
--set max_steps=1"""
RESUME = f"{workplace.TRAIN} --resume"
RESUME_SCORER = f"{workplace.TRAIN_SCORER} --resume"
CALIBRATE = "route calibrate --router ../ours/router --labels ../data/labels.jsonl"
CLASSIFY = "expert classify --experts ../ours/experts --classifier ../ours/head 2+2"
PRUNE = f"{workplace.PRUNE} --out new"
TARGETS = [
    Target("scorer/pliant.json", SCORE),
    Target("scorer/adapter-c29bff51904683f6.safetensors", SCORE),
    Target("router/router.json", ASK),
    Target("router/router.json", REPORT),
    Target("router/fit-*/scorer/scorer.json", ASK),
    Target("router/fit-*/scorer/scorer.safetensors", ASK),
    Target("router/fit-*/scorer/scorer.json", "score ../ours/router 2+2"),
    Target("router/fit-*/scorer/novelty.safetensors", ASK),
    Target("router/fit-*/scorer/corrections.safetensors", ASK),
    Target("router/fit-*/seen.safetensors", ASK),
    Target("router/ledger.sqlite", REPORT),
    Target("router/ledger.sqlite", LEARN),
    Target("router/fit-*/baselines/length/scorer.json", REPORT),
    Target("router/fit-*/baselines/length/scorer.safetensors", REPORT),
    Target("experts/words/adapter_config.json", EXPERT_ASK),
    Target("experts/words/adapter_model.safetensors", EXPERT_ASK),
    Target("experts/words/adapter_config.json", MERGE),
    Target("experts/words/adapter_model.safetensors", MERGE),
    Target("experts/words/adapter_config.json", "expert show ../ours/experts/words"),
    Target("experts/words/adapter_model.safetensors", "expert show ../ours/experts/words"),
    Target("experts/words/adapter_config.json", "expert list ../ours/experts"),
    Target("gates/pliant.json", EXPORT),
    Target("gates/adapter-63e367010f6fda2f.safetensors", EXPORT),
    Target("pruned/notes.json", PRUNE),
    Target("pruned/pruned.json", PRUNE),
    Target("labels.answers.jsonl", workplace.LABEL),
    Target("labels.jsonl", workplace.LABEL),
    Target("head/pliant.json", CLASSIFY),
    Target("head/adapter-*.safetensors", CLASSIFY),
    Target("pruned/gates/pliant.json", PRUNE),
    Target("pruned/gates/adapter-*.safetensors", PRUNE),
    Target("pruned/compensation/pliant.json", PRUNE),
    Target("pruned/compensation/adapter-*.safetensors", PRUNE),
    Target(
        "router/router.json", "route evaluate --router ../ours/router --labels ../data/labels.jsonl"
    ),
    Target("router/fit-*/fit.json", REPORT),
    Target("router/fit-*/out-of-fold.safetensors", CALIBRATE),
    Target("router/fit-*/scorer/background.safetensors", ASK),
    Target("scorer-run/pliant-train.json", RESUME_SCORER),
    Target("scorer-run/checkpoint-2/adapters/complexity/pliant.json", RESUME_SCORER),
    Target("scorer-run/checkpoint-2/adapters/complexity/adapter-*.safetensors", RESUME_SCORER),
    Target("scorer-run/checkpoint-2/optimizer.pt", RESUME_SCORER),
    Target("scorer-run/checkpoint-2/trainer_state.json", RESUME_SCORER),
    Target("scorer-run/checkpoint-2/complete.json", RESUME_SCORER),
    Target("prefixes/*/00000.safetensors", RESUME_SCORER),
    Target("run/checkpoint-1/complete.json", RESUME),
    Target("run/checkpoint-1/adapters/gradients/pliant.json", RESUME),
    Target("run/checkpoint-1/adapters/gradients/adapter-*.safetensors", RESUME),
    Target("run/pliant-train.json", RESUME),
    Target("run/checkpoint-1/optimizer.pt", RESUME),
    Target("run/checkpoint-1/scheduler.pt", RESUME),
    Target("run/checkpoint-1/rng_state.pth", RESUME),
    Target("run/checkpoint-1/trainer_state.json", RESUME),
    Target("run/checkpoint-1/model.safetensors", RESUME),
    Target("model/config.json", "doctor ../ours/model"),
    Target("model/config.json", "importance ../ours/model --data ../data/notes.txt --tokens 40"),
    Target("model/model.safetensors", RECOVER),
    Target("model/tokenizer.json", RECOVER),
]


class Marker:
    """Unpickled, it runs code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch code-ran",)


def attack(worker: Worker, place: Workplace, count: int, seed: int = 0) -> Tally:
    """So many forgeries, as many of each file, and the command that reads it.

    Each command succeeds with the files as they are, or it would not get as far as the forged one.
    """
    tally, draw = Tally("forged files"), random.Random(seed)
    targets = draw.sample(TARGETS, min(count, len(TARGETS)))
    for words in dict.fromkeys(target.words for target in targets):
        before = place.state()
        done = worker.run(words.split(), place.cwd)
        harmed = place.reset(before)
        tally.add(f"unforged: {words}", fault(done, harmed) or not_right(done), done)
    share = -(-count // len(targets))
    for target in targets:
        (path,) = (place.folder / "ours").glob(target.path)
        forged = list(forgeries(path))
        for what, content in draw.sample(forged, min(share, len(forged))):
            _tried(tally, worker, place, target, what, {path: content})
    return tally


def attack_sealed(worker: Worker, place: Workplace, count: int, seed: int = 0) -> Tally:
    """The same of files that a checksum covers, which is made anew: it detects nothing."""
    tally, draw = Tally("sealed forgeries"), random.Random(seed)
    paths = {target: next((place.folder / "ours").glob(target.path)) for target in TARGETS}
    sealed = [target for target in TARGETS if resealed(paths[target], b"") is not None]
    for path, target in {paths[target]: target for target in sealed}.items():
        _resealed_unchanged(tally, worker, place, target, path)
    targets = draw.sample(sealed, min(count, len(sealed)))
    share = -(-count // len(targets))
    for target in targets:
        path = paths[target]
        forged = list(forgeries(path, sealed=True))
        for what, content in draw.sample(forged, min(share, len(forged))):
            files = resealed(path, content)
            assert files is not None
            _tried(tally, worker, place, target, what, files)
    return tally


def _resealed_unchanged(
    tally: Tally, worker: Worker, place: Workplace, target: Target, path: Path
) -> None:
    """It is accepted, or the checksum is another now and each forgery is refused for that alone."""
    files = resealed(path, path.read_bytes())
    assert files is not None
    before, done = place.state(), _run_on(files, worker, place, target)
    harmed = place.reset(before)
    tally.add(f"{target.path}: resealed", fault(done, harmed) or not_right(done), done)


def _tried(
    tally: Tally, worker: Worker, place: Workplace, target: Target, what: str, files: Files
) -> None:
    before, done = place.state(), _run_on(files, worker, place, target)
    ran = (place.cwd / "code-ran").exists()
    problem = fault(done, place.reset(before)) or not_finite(done)
    problem = "code was run" if ran else problem
    tally.add(f"{target.path}: {what} ({target.words.split()[0]})", problem, done)


def _run_on(files: Files, worker: Worker, place: Workplace, target: Target) -> Done:
    for path, content in files.items():
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
    return worker.run(target.words.split(), place.cwd)


def forgeries(path: Path, *, sealed: bool = False) -> Iterator[tuple[str, bytes]]:
    content = path.read_bytes()
    if path.suffix == ".safetensors":
        yield from wrong_tensors(content)
    if path.suffix == ".sqlite":
        yield from _edited_tables(path)
    if sealed and path.suffix == ".json":
        yield from _edited(json.loads(content))
    if sealed and path.suffix in (".json", ".safetensors"):
        return  # a checksum does not change how a damaged file is read
    yield "empty", b""
    yield "half", content[: len(content) // 2]
    yield "zeros", bytes(len(content))
    yield "a pickle", pickle.dumps(Marker())
    if path.suffix in (".pt", ".pth"):  # of a size that a checkpoint's marker has recorded
        yield "a pickle of its size", pickle.dumps(Marker()).ljust(len(content), b"\0")
    yield "deep", DEEP
    yield "no UTF-8", b"\xff\xfe" + content
    if path.suffix == ".json":
        yield from _edited(json.loads(content))
    if path.suffix == ".jsonl":
        yield from _edited_line(content.splitlines(keepends=True))
    if path.suffix == ".safetensors":
        yield from _lying(content)


def _edited(content: Any) -> Iterator[tuple[str, bytes]]:
    for where in _places(content):
        for value in (*ODD, GONE):
            edited = copy.deepcopy(content)
            _put(edited, where, value)
            name = "gone" if value is GONE else repr(value)[:30]
            yield f"{'.'.join(map(str, where))} = {name}", json.dumps(edited).encode()


def _edited_line(lines: list[bytes]) -> Iterator[tuple[str, bytes]]:
    for i, line in enumerate(lines):
        yield f"line {i + 1} twice", b"".join([*lines, line])
        yield f"line {i + 1} is gone", b"".join([*lines[:i], *lines[i + 1 :]])
        for what, edited in _edited(json.loads(line)):
            yield f"line {i + 1}: {what}", b"".join([*lines[:i], edited, b"\n", *lines[i + 1 :]])


def _edited_tables(path: Path) -> Iterator[tuple[str, bytes]]:
    """A ledger with an odd value in each column, where its own rules allow it."""
    odd: list[Any] = [None, -1, 2**62, float("inf"), "../../theirs", b"\xff"]
    with tempfile.TemporaryDirectory() as folder:
        copied = Path(folder, path.name)
        for (table, column), value in itertools.product(_columns(path), odd):
            shutil.copyfile(path, copied)
            try:
                with contextlib.closing(sqlite3.connect(copied)) as ledger, ledger:
                    ledger.execute(f'update "{table}" set "{column}" = ?', (value,))
            except sqlite3.IntegrityError:
                continue  # the table refuses it
            yield f"{table}.{column} = {value!r}", copied.read_bytes()


def _columns(path: Path) -> list[tuple[str, str]]:
    with contextlib.closing(sqlite3.connect(path)) as ledger:
        names = ledger.execute("select name from sqlite_master where type = 'table'").fetchall()
        return [
            (table, column[1])
            for (table,) in names
            for column in ledger.execute(f'pragma table_info("{table}")')
        ]


def _places(content: Any, start: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = content.items() if isinstance(content, dict) else ()
    if isinstance(content, list):
        items = enumerate(content[:2])  # type: ignore[assignment]
    for key, value in items:
        yield (*start, key)
        if len(start) < 3:
            yield from _places(value, (*start, key))


def _put(content: Any, where: tuple[Any, ...], value: Any) -> None:
    *way, last = where
    for key in way:
        content = content[key]
    if value is GONE:
        del content[last]
    else:
        content[last] = value


def _lying(content: bytes) -> Iterator[tuple[str, bytes]]:
    """A safetensors file whose header lies about what follows."""
    (size,) = struct.unpack("<Q", content[:8])
    header, body = json.loads(content[8 : 8 + size]), content[8 + size :]

    def file(changed: Any, length: int | None = None, data: bytes = body) -> bytes:
        text = json.dumps(changed).encode()
        return struct.pack("<Q", len(text) if length is None else length) + text + data

    for length in (2**64 - 1, 2**63, 2**40, 10**9, 0, 1):
        yield f"a header of {length}", file(header, length)
    yield "a deep header", struct.pack("<Q", len(DEEP)) + DEEP + body
    yield "no tensors", file({})
    yield "a list", file([])
    yield "infinite", file(header, data=b"\xff\xf0\x7f\x7f"[:4] * (len(body) // 4 + 1))
    yield (
        "not a number",
        file(header, data=(b"\x00\x00\xc0\x7f" * (len(body) // 4 + 1))[: len(body)]),
    )
    yield "one byte short", file(header, data=body[:-1])
    for name in [name for name in header if name != "__metadata__"][:2]:
        about = header[name]
        shapes: list[Any] = [[2**40, 2**40], [10**9], [-1], [], [0], "x", None, [1.5], [1] * 100]
        for shape in shapes:
            yield (
                f"{name} of shape {str(shape)[:20]}",
                file({**header, name: {**about, "shape": shape}}),
            )
        for dtype in ("I64", "F64", "BOOL", "F8_E4M3", "X", None):
            yield f"{name} of {dtype}", file({**header, name: {**about, "dtype": dtype}})
        start, end = about["data_offsets"]
        for offsets in ([0, 2**63], [end, start], [-1, end], [start, end + 4], [], "x"):
            lie = {**about, "data_offsets": offsets}
            yield f"{name} at {offsets}", file({**header, name: lie})
        without = {each: value for each, value in header.items() if each != name}
        yield f"{name} has another name", file({**without, name + "x": about})
        flat = 1
        for length in about["shape"]:
            flat *= length
        yield f"{name} flat", file({**header, name: {**about, "shape": [flat]}})
        yield f"{name} in one row", file({**header, name: {**about, "shape": [1, 1, flat]}})
