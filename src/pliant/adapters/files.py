"""An adapter's folder: `pliant.json`, the weights it names, and a card.

`pliant.json` is the truth. It names its weights file by their content, so that writing it is the
one moment at which a new save takes the old one's place: killed before, the folder holds the old
adapter; killed after, the new one. Nothing read from a folder is run, and nothing is believed that
its checksum does not cover.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from pliant.adapters.fingerprint import Fingerprint
from pliant.errors import AdapterError, CorruptFile

FORMAT = 1
INDEX = "pliant.json"
DIGITS = 16  # of the content's SHA-256, in the name of the weights file
WEIGHTS = f"adapter-{'[0-9a-f]' * DIGITS}.safetensors"  # a pattern for these files and no others
CARD = "README.md"
UNFINISHED = ".{}.unfinished"


@dataclass(frozen=True)
class Index:
    """The content of `pliant.json`."""

    format: int
    pliant: str
    """The version of Pliant that wrote it."""
    part: str
    """The part of Pliant that it belongs to, such as `structure`."""
    kind: str
    """The class's name."""
    config: dict[str, Any]
    state: dict[str, Any]
    """What the adapter keeps besides tensors, by state-dict key."""
    weights: str
    """The file's name."""
    sha256: str
    """The file's content."""
    base: Fingerprint


@dataclass(frozen=True)
class Saved:
    """All that a folder says of an adapter."""

    folder: Path
    index: Index
    tensors: dict[str, Tensor]


def write(folder: Path, index: Index, weights: bytes, card: str) -> None:
    """Put an adapter into `folder`, in place of what was there, all of it or nothing."""
    assert index.sha256 == hashlib.sha256(weights).hexdigest()
    content = json.loads(json.dumps(asdict(index)))  # as it will be read, integer keys and all
    content["checksum"] = _checksum(content)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / index.weights, weights)
        write_file(folder / INDEX, (json.dumps(content, indent=2) + "\n").encode())
        for old in _left_behind(folder, index.weights):
            old.unlink()
        _write_card(folder / CARD, card)
    except OSError as error:
        raise AdapterError(f"{folder}: cannot be written ({error.strerror or error})") from error


def packed(tensors: dict[str, Tensor]) -> tuple[bytes, str, str]:
    """The weights as a safetensors file, the name of the file and its SHA-256."""
    apart = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    content = safetensors.torch.save(apart, {"format": "pt"})
    digest = hashlib.sha256(content).hexdigest()
    return content, f"adapter-{digest[:DIGITS]}.safetensors", digest


def write_file(path: Path, content: bytes) -> None:
    """Write a file in one step: a reader of `path` finds the old content or the new, never part."""
    unfinished = path.with_name(UNFINISHED.format(path.name))
    try:
        with unfinished.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def read(folder: Path) -> Saved:
    """What `folder` holds, checked as a whole before any of it is believed."""
    try:
        index = _index(folder)
        return Saved(folder, index, _weights(folder, index))
    except OSError as error:
        raise AdapterError(f"{folder}: cannot be read ({error.strerror or error})") from error


def locate(source: str | Path, **hub: Any) -> Path:
    """The folder that `source` names: itself if it is one, else a download of a hub repository."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    text = str(source)
    if folder.is_absolute() or text.startswith((".", "~")) or text.count("/") > 1:
        raise AdapterError(f"{text}: there is no such folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(text, allow_patterns=[INDEX, WEIGHTS], **hub))
    except Exception as error:  # the hub's client has dozens of kinds, with no common root
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise AdapterError(f"{text}: no folder, and not found on the hub ({reason})") from error


# --- what can be wrong with a folder -------------------------------------------------------------


def _index(folder: Path) -> Index:
    path = folder / INDEX
    if not path.is_file():
        raise CorruptFile(f"{folder}: holds no {INDEX}, so no adapter of Pliant's{_whose(folder)}")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CorruptFile(f"{path}: not JSON, truncated or damaged ({error})") from error
    if not isinstance(content, dict) or not isinstance(content.get("format"), int):
        raise CorruptFile(f"{path}: not written by Pliant (it states no format)")
    if content["format"] > FORMAT:
        raise CorruptFile(
            f"{path}: of format {content['format']}, written by Pliant {content.get('pliant')}; "
            f"this one reads formats up to {FORMAT}: pip install -U pliant"
        )
    if content.pop("checksum", None) != _checksum(content):
        raise CorruptFile(f"{path}: damaged, or edited by hand (its checksum does not fit)")
    try:
        return TypeAdapter(Index).validate_python(content)
    except ValidationError as error:
        raise CorruptFile(f"{path}: not what Pliant writes ({first_line(error)})") from error


def _weights(folder: Path, index: Index) -> dict[str, Tensor]:
    path = folder / index.weights
    if path.parent != folder or not path.is_file():
        raise CorruptFile(f"{path}: missing, although {INDEX} names it")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != index.sha256:
        raise CorruptFile(f"{path}: truncated or damaged (its checksum does not fit)")
    try:  # safetensors shuffles, and all processes must scatter what is sharded in one order
        return dict(sorted(safetensors.torch.load(content).items()))
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise CorruptFile(f"{path}: not a safetensors file ({error})") from error


def _whose(folder: Path) -> str:
    if (folder / "adapter_config.json").is_file():
        return "; it looks like peft's: peft.PeftModel.from_pretrained(model, folder) loads those"
    if (folder / "config.json").is_file():
        return "; it looks like a model: AutoModelForCausalLM.from_pretrained(folder) loads those"
    return ""


def first_line(error: ValidationError) -> str:
    """Where pydantic found the first fault, and which."""
    fault = error.errors()[0]
    return f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}"


def _left_behind(folder: Path, current: str) -> set[Path]:
    """The weights of older saves, and what saves that were killed had begun."""
    older = {path for path in folder.glob(WEIGHTS) if path.name != current}
    begun = [UNFINISHED.format(name) for name in (INDEX, WEIGHTS, CARD)]
    return older.union(*(folder.glob(pattern) for pattern in begun))


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _write_card(path: Path, card: str) -> None:
    """Write the card, unless somebody has made it their own by taking our last line out."""
    ours = card.splitlines()[-1]
    if not path.exists() or ours in path.read_text(errors="replace"):
        write_file(path, card.encode())
