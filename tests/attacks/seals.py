"""The checksums that Pliant writes, made anew by whoever has changed what they cover."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load, save

Files = dict[Path, bytes | None]
"""Contents by path; None is a file that goes."""


def resealed(path: Path, content: bytes) -> Files | None:
    """All files that somebody writes who puts `content` at `path` and knows the checksums; None if
    no checksum covers that file."""
    if path.name == "pliant.json":
        return _index(path, content)
    if path.name.startswith("adapter-"):
        return _weights(path, content)
    if path.name in ("scorer.json", "scorer.safetensors"):
        return _scorer(path, content)
    if path.parent.name.startswith("checkpoint-"):
        return _checkpoint(path, content)
    return None


def _index(path: Path, content: bytes) -> Files:
    """The checksum is in the file itself."""
    index = _object(content)
    if index is not None:
        index.pop("checksum", None)
        text = json.dumps(index, sort_keys=True).encode()
        index["checksum"] = hashlib.sha256(text).hexdigest()
        content = json.dumps(index).encode()
    return {path: content, **_marker(path, content)}


def _weights(path: Path, content: bytes) -> Files:
    """The index has the file's name, which is a part of its hash, and all of it."""
    digest = hashlib.sha256(content).hexdigest()
    name = f"adapter-{digest[:16]}.safetensors"
    index = json.loads((path.parent / "pliant.json").read_bytes())
    files = _index(
        path.parent / "pliant.json",
        json.dumps({**index, "weights": name, "sha256": digest}).encode(),
    )
    return {path: None, **files, path.parent / name: content}


def _scorer(path: Path, content: bytes) -> Files:
    """A hash of the settings and the weights, which what was learned afterwards repeats."""
    files: Files = {path.parent / name: (path.parent / name).read_bytes() for name in _SCORER}
    files[path] = content
    settings, weights = (files[path.parent / name] or b"" for name in _SCORER)
    index = _object(settings)
    if index is None:
        return files
    digest = hashlib.sha256(json.dumps(index.get("settings")).encode() + weights).hexdigest()
    index["digest"] = digest
    files[path.parent / "scorer.json"] = json.dumps(index).encode()
    learned = path.parent / "corrections.safetensors"
    if learned.is_file():
        arrays = load(learned.read_bytes())
        arrays["scorer"] = np.frombuffer(digest.encode(), dtype=np.uint8)
        files[learned] = save(arrays)
    return files


_SCORER = ("scorer.json", "scorer.safetensors")


def _checkpoint(path: Path, content: bytes) -> Files:
    """A marker has the sizes of all files."""
    return {path: content, **_marker(path, content)}


def _marker(path: Path, content: bytes) -> Files:
    for folder in path.parents:
        marker = folder / "complete.json"
        if marker.is_file() and marker != path:
            files = json.loads(marker.read_bytes())["files"]
            files[path.relative_to(folder).as_posix()] = len(content)
            return {marker: json.dumps({"files": files}).encode()}
    return {}


def _object(content: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


# --- what is whole, and wrong --------------------------------------------------------------------


def wrong_tensors(content: bytes) -> Iterator[tuple[str, bytes]]:
    """Valid safetensors files of other numbers, shapes, types and names."""
    arrays = load(content)
    for name, array in list(arrays.items())[:4]:
        for what, changed in _wrong(array):
            yield f"{name} {what}", save({**arrays, name: np.ascontiguousarray(changed)})
        others = {key: value for key, value in arrays.items() if key != name}
        yield f"without {name}", save(others)
        yield f"{name} under a path", save({**others, f"../../theirs/{name}": array})
    if len(arrays) > 1:
        first, second = list(arrays)[:2]
        swapped = {**arrays, first: arrays[second], second: arrays[first]}
        yield f"{first} and {second} swapped", save(swapped)
    yield "one more", save({**arrays, "one.more": np.zeros(3, np.float32)})


def _wrong(array: Any) -> Iterator[tuple[str, Any]]:
    for value in (np.nan, np.inf, -np.inf, 0, -1, 3e38, 2**31 - 1, -(2**31)):
        if array.dtype.kind == "f" or (np.isfinite(value) and abs(value) < 2**31):
            if array.dtype.kind == "u" and value < 0:
                continue
            with np.errstate(over="ignore"):
                yield f"of {value:.4g}", np.full_like(array, value)
            if array.size > 1:
                changed = array.copy()
                with np.errstate(over="ignore"):
                    changed.reshape(-1)[-1] = value
                yield f"with a {value:.4g}", changed
    for dtype in (np.float16, np.float64, np.int64, np.uint8, np.bool_):
        if array.dtype != dtype:
            with np.errstate(all="ignore"):
                yield f"of {np.dtype(dtype).name}", np.nan_to_num(array).astype(dtype)
    yield "longer", np.concatenate([array, array]) if array.ndim else np.stack([array, array])
    yield "shorter", array[:-1] if array.ndim else array.reshape(1)[:0]
    yield "of no row", array[:0] if array.ndim else array.reshape(1)[:0]
    yield "in one more dimension", array[None]
    yield "the other way round", array.T if array.ndim > 1 else array[::-1] if array.ndim else array
