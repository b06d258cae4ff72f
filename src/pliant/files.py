"""Files and folders that are written completely or not at all, whoever else writes beside them.

    write_file(Path("report.html"), page)
    with replacing(Path("labels.jsonl"), private=True) as file:
        ...
    with new_folder(Path("smaller")) as unfinished:
        ...

The content goes to an unfinished file of a name that nobody else has, which then takes the place of
the old one in a single step. A symbolic link is followed, and a pipe or a device is written to: it
is never replaced by a file.
"""

from __future__ import annotations

import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from pliant.errors import AdapterError, InvalidInput

UNFINISHED = ".{}.unfinished"
"""How the name of an unfinished file or folder begins; the rest is random."""
SVG = (b"<?xml", b"<svg")
"""How the pictures begin that we write."""
PRIVATE = 0o600
"""Read and written by their owner alone."""
_SHOWN = 50  # letters of a name: a file system allows 255 bytes in all


def write_file(path: Path, content: bytes, *, private: bool = False) -> None:
    """Replace a file atomically: a reader sees the old content or the new, never a part."""
    with replacing(path, private=private) as file:
        file.write(content)


@contextmanager
def replacing(path: Path, *, private: bool = False) -> Iterator[IO[bytes]]:
    """A file to write to, whose content becomes that of `path` at the end; after an error nothing
    has changed.

    An existing file keeps its permissions. A new one is readable as the system says, or, if it is
    `private`, by its owner alone.
    """
    target = Path(os.path.realpath(path))
    mode = _mode_of(target)
    if mode is not None and not stat.S_ISREG(mode):  # a pipe, a device; a folder is an error
        with target.open("wb") as file:
            yield file
        return
    permissions = PRIVATE if private and mode is None else mode
    unfinished = unfinished_name(target)
    try:
        with unfinished.open("xb") as file:
            if permissions is not None:
                unfinished.chmod(stat.S_IMODE(permissions))
            yield file
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(target)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def cache_folder(variable: str, name: str) -> Path:
    """The folder that the environment's `variable` names, or `pliant/NAME` in the user's cache."""
    if configured := os.environ.get(variable):
        return Path(configured).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "pliant" / name


def unfinished_name(path: Path) -> Path:
    """The name of a new file or folder beside `path`, for its unfinished content."""
    start = UNFINISHED.format(path.name[:_SHOWN])
    return path.with_name(f"{start}-{secrets.token_hex(8)}")


def leftovers(path: Path) -> list[Path]:
    """What writers of `path` that were killed have left, and what those at work are writing."""
    start = UNFINISHED.format(path.name[:_SHOWN])
    return [each for each in path.parent.iterdir() if each.name.startswith(start)]


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """In this context no other process or thread that locks the folder is at work in it.

    Yields False where the system or the file system has no such locks.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield False
        return
    handle, held = os.open(folder, os.O_RDONLY), False
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
            held = True
        yield held
    finally:
        os.close(handle)


def check_new(target: Path) -> None:
    """Refuse a folder that holds anything or cannot be made, before work begins."""
    dangling = target.is_symlink() and not target.exists()
    if target.is_file() or dangling or (target.is_dir() and any(target.iterdir())):
        raise InvalidInput(f"{target} exists already: name a new folder")
    if target.resolve() == Path.cwd():
        raise InvalidInput(f"{target} is the folder that you are in: name a new folder")
    check_writable(target)


def check_writable(path: Path) -> None:
    """Refuse a file or folder that cannot be made; nothing is."""
    target = Path(os.path.realpath(path))
    mode = _mode_of(target)
    if mode is not None and not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        if not os.access(target, os.W_OK):
            raise InvalidInput(f"{path}: cannot be written (no permission)")
        return
    if not target.name:
        raise InvalidInput(f"{path} is the root of the file system: name another place")
    place = next(each for each in target.parents if each.exists())
    try:
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        raise InvalidInput(
            f"{path}: cannot be written ({place}: {error.strerror or error})"
        ) from error


def check_ours(path: Path, *starts: bytes) -> None:
    """Refuse to replace a file that begins otherwise than those that we write: it is somebody
    else's, and would be lost."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        start = file.read(max(map(len, starts)))
    if start and not start.startswith(starts):
        raise InvalidInput(f"{path}: holds something else, which would be lost: name another file")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to write to, which becomes `target` at the end; after an error it is removed."""
    unfinished = unfinished_name(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished.mkdir()
        yield unfinished
        unfinished.replace(target)
    except OSError as error:
        raise AdapterError(f"{target}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _mode_of(path: Path) -> int | None:
    """Kind and permissions of what is there; None if nothing is."""
    try:
        return path.stat().st_mode
    except OSError:
        return None
