"""Where on this machine the bases are whose paths no adapter's file may name.

A path is private, and useless to others, so an adapter that was trained on a local folder is saved
without it. A note in the user's cache remembers it, by the base's fingerprint: the adapter finds
its base again wherever its own folder is moved, on this machine alone.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pliant.files import cache_folder, write_file

IDENTITY = ("model", "shapes", "samples", "grid")
"""The fields of a fingerprint that identify a base."""


def note_place(fingerprint: Mapping[str, Any], place: object) -> None:
    """Remember that the base of this fingerprint was loaded from `place`, if that is a folder.

    Nothing depends on it: where the cache cannot be written, nothing is remembered.
    """
    if fingerprint.get("name") or not fingerprint.get("samples") or not place:
        return  # anybody can load it by its name; or several bases may have this fingerprint
    with suppress(OSError, RuntimeError):
        folder = Path(str(place)).expanduser()
        if _is_model(folder):
            path = _note_of(fingerprint)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, os.fsencode(folder.resolve()), private=True)


def noted_place(fingerprint: Mapping[str, Any]) -> str:
    """The folder of the base of this fingerprint; empty if there is no note, or no such folder."""
    with suppress(OSError, RuntimeError):
        place = os.fsdecode(_note_of(fingerprint).read_bytes())
        if _is_model(Path(place)):
            return place
    return ""


def _is_model(folder: Path) -> bool:
    """Whether it can be loaded: a model, or a LoRA, which is loaded as its base with it merged."""
    return any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))


def _note_of(fingerprint: Mapping[str, Any]) -> Path:
    content = json.dumps([fingerprint.get(name) for name in IDENTITY], sort_keys=True)
    digest = hashlib.sha256(content.encode()).hexdigest()
    return cache_folder("PLIANT_BASES", "bases") / "places" / f"{digest[:32]}.txt"
