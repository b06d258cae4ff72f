"""A router's folder: what a fit writes into it and removes from it, and that nothing else changes.

A fit writes a folder of its own, then router.json, which names it: before that moment the router is
the old one, after it the new one.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from pliant.errors import CorruptFile, InvalidInput
from pliant.files import check_writable, locked, new_folder
from pliant.routing import router_file
from pliant.routing.fitting.evaluate import BASELINES
from pliant.routing.fitting.splits import HASHES
from pliant.routing.router_file import RouterFile

RECORD = "fit.json"
SCORER = "scorer"
_FOLDER = re.compile(r"fit-[0-9a-f]{8}")
_OURS = re.compile(rf"{_FOLDER.pattern}|\.({_FOLDER.pattern}|router\.json)\.unfinished-[0-9a-f]+")
"""What a fit that was killed leaves in the router's folder."""
_FORMERLY = (SCORER, BASELINES, RECORD, HASHES)
"""What a fit of Pliant 0.1 wrote directly into the router's folder."""


def refuse_folder(folder: Path) -> None:
    """Before the work: a folder that cannot be written, or holds something else than a router."""
    check_writable(folder)
    if folder.is_file():
        raise InvalidInput(f"{folder} is a file; a router is a folder")
    if not folder.is_dir():
        return
    if (folder / router_file.NAME).exists():
        _former(folder)
        return
    if not all(_OURS.fullmatch(path.name) for path in folder.iterdir()):
        raise InvalidInput(f"{folder} is not empty and holds no router: name another folder")


def replace_fit(folder: Path, file: RouterFile, save: Callable[[Path], None]) -> None:
    """`save` the fit's folder, write router.json, which names it, then remove the fit before it."""
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with locked(folder) as alone:
            former = _former(folder)
            with new_folder(file.fit_folder(folder)) as unfinished:
                save(unfinished)
            file.write(folder)
            if alone:
                _remove_others(folder, file, former)
    except BaseException:
        if is_new:
            with suppress(OSError):  # it holds something
                folder.rmdir()
        raise


def _former(folder: Path) -> RouterFile | None:
    """The router that a fit replaces; None if there is none, or if somebody has edited its file so
    that it cannot be read."""
    path = folder / router_file.NAME
    try:
        return router_file.read(folder) if path.exists() else None
    except CorruptFile as error:
        raise InvalidInput(f"{error}: name another folder, or move this file away") from None
    except InvalidInput:
        return None


def _remove_others(folder: Path, file: RouterFile, former: RouterFile | None) -> None:
    """Remove what earlier fits wrote, and nothing else; no other fit is at work."""
    current = file.fit_folder(folder)
    others = [path for path in folder.iterdir() if _OURS.fullmatch(path.name) and path != current]
    if former is not None and former.scorer.folder == SCORER:
        others += [folder / name for name in _FORMERLY]
    for path in others:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
