"""An adapter's folder: `pliant.json`, the weights file that it names, and a model card.

The name of the weights file is derived from its content, and `pliant.json` is written after it. So
a new save replaces the old one at a single moment: killed before it, the folder holds the old
adapter; killed after it, the new one. Reading a folder runs no code from it, and uses nothing that
its checksums do not cover.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import safetensors.torch
from huggingface_hub import ModelCardData
from torch import Tensor

from pliant.adapters.fingerprint import Fingerprint
from pliant.errors import AdapterError, CorruptFile
from pliant.files import UNFINISHED, locked, write_file
from pliant.loading import embedded

if TYPE_CHECKING:
    from pydantic import ValidationError

Content = TypeVar("Content")

FORMAT = 1
INDEX = "pliant.json"
DIGITS = 16  # of the content's SHA-256, in the name of the weights file
WEIGHTS = f"adapter-{'[0-9a-f]' * DIGITS}.safetensors"  # matches weights files and no others
CARD = "README.md"


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
    """The adapter's state besides its tensors, by state-dict key."""
    weights: str
    """The file's name."""
    sha256: str
    """The file's content."""
    base: Fingerprint


@dataclass(frozen=True)
class Saved:
    """The content of an adapter's folder."""

    folder: Path
    index: Index
    tensors: dict[str, Tensor]


def write(folder: Path, index: Index, weights: bytes, numbers: int) -> None:
    """Write an adapter of so many `numbers` to `folder`, replacing an older one, all or nothing."""
    assert index.sha256 == hashlib.sha256(weights).hexdigest()
    content = json.loads(json.dumps(asdict(index)))  # JSON turns integer keys into strings
    content["checksum"] = _checksum(content)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder) as alone:
            write_file(folder / index.weights, weights)
            write_file(folder / INDEX, (json.dumps(content, indent=2) + "\n").encode())
            for old in _leftovers(folder, index.weights, alone):
                old.unlink()
            _write_card(folder / CARD, model_card(index, numbers, len(weights)))
    except OSError as error:
        raise AdapterError(f"{folder}: cannot be written ({error.strerror or error})") from error


def serialize(tensors: dict[str, Tensor]) -> tuple[bytes, str, str]:
    """The content of a safetensors file, its name and its SHA-256."""
    copies = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    content = safetensors.torch.save(copies, {"format": "pt"})
    digest = hashlib.sha256(content).hexdigest()
    return content, f"adapter-{digest[:DIGITS]}.safetensors", digest


def read(folder: Path) -> Saved:
    """The content of `folder`, after all of it was checked."""
    return _of_one_save(folder, lambda index: Saved(folder, index, _weights(folder, index)))


def check_finite(tensor: Tensor, name: str, place: Path) -> None:
    """Refuse the weights of a training that had diverged: whatever reads them computes NaN."""
    if tensor.is_floating_point() and not tensor.isfinite().all():
        raise CorruptFile(f"{place}: {name} holds NaN or infinity: its training had diverged")


def open_weights(folder: Path) -> tuple[Index, Path]:
    """The index of `folder` and its weights file, whose checksum is compared but which is not
    loaded."""
    return _of_one_save(folder, lambda index: (index, _intact(folder, index)))


def _of_one_save(folder: Path, read: Callable[[Index], Content]) -> Content:
    """What `read` makes of the index; read again if another process saves at the same time, and
    removes the weights that the index names."""
    try:
        index = _index(folder)
        while True:
            try:
                return read(index)
            except (CorruptFile, FileNotFoundError):
                now = _index(folder)
                if now == index:
                    raise
                index = now
    except OSError as error:
        raise AdapterError(f"{folder}: cannot be read ({error.strerror or error})") from error


def locate(source: str | Path, **hub: Any) -> Path:
    """The folder `source`, or else the download of the hub repository `source`."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    text = str(source)
    if folder.is_absolute() or text.startswith((".", "~")) or text.count("/") > 1:
        raise AdapterError(f"{text}: no such folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(text, allow_patterns=[INDEX, WEIGHTS], **hub))
    except Exception as error:  # the hub's client has dozens of kinds without a common base
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise AdapterError(f"{text}: no such folder, and no such hub model ({reason})") from error


# --- checks --------------------------------------------------------------------------------------


def _index(folder: Path) -> Index:
    path = folder / INDEX
    if not path.is_file():
        raise CorruptFile(f"{folder}: has no {INDEX}, so it is no Pliant adapter{_hint(folder)}")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CorruptFile(f"{path}: not JSON: truncated or damaged ({error})") from error
    if not isinstance(content, dict) or not isinstance(content.get("format"), int):
        raise CorruptFile(f"{path}: not written by Pliant (it has no format number)")
    if content["format"] > FORMAT:
        raise CorruptFile(
            f"{path}: has format {content['format']}, written by Pliant {content.get('pliant')}; "
            f"this version reads formats up to {FORMAT}: pip install -U pliant"
        )
    if content.pop("checksum", None) != _checksum(content):
        raise CorruptFile(f"{path}: damaged, or edited by hand (its checksum does not match)")
    from pydantic import TypeAdapter, ValidationError  # not needed to attach

    try:
        return TypeAdapter(Index).validate_python(content)
    except ValidationError as error:
        raise CorruptFile(f"{path}: has invalid fields ({first_fault(error)})") from error


def _intact(folder: Path, index: Index) -> Path:
    """The weights file, after its checksum was compared."""
    path = folder / index.weights
    if path.parent != folder or not path.is_file():
        raise CorruptFile(f"{path}: missing, although {INDEX} names it")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != index.sha256:
        raise CorruptFile(f"{path}: truncated or damaged (its checksum does not match)")
    return path


def _weights(folder: Path, index: Index) -> dict[str, Tensor]:
    path = folder / index.weights
    if path.parent != folder or not path.is_file():
        raise CorruptFile(f"{path}: missing, although {INDEX} names it")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != index.sha256:
        raise CorruptFile(f"{path}: truncated or damaged (its checksum does not match)")
    try:  # safetensors shuffles, but all processes must scatter sharded tensors in the same order
        return dict(sorted(safetensors.torch.load(content).items()))
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise CorruptFile(f"{path}: not a safetensors file ({error})") from error


def _hint(folder: Path) -> str:
    if (folder / "adapter_config.json").is_file():
        return "; it looks like peft's: peft.PeftModel.from_pretrained(model, folder) loads those"
    if (folder / "config.json").is_file():
        return "; it looks like a model: AutoModelForCausalLM.from_pretrained(folder) loads those"
    return ""


def first_fault(error: ValidationError) -> str:
    """The first field that pydantic rejects, and the reason."""
    fault = error.errors()[0]
    return f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}"


def _leftovers(folder: Path, current: str, alone: bool) -> set[Path]:
    """The weights of older saves, and, if no other save can be at work, the unfinished files of
    killed ones."""
    older = {path for path in folder.glob(WEIGHTS) if path.name != current}
    patterns = [f"{UNFINISHED.format(name)}*" for name in (INDEX, WEIGHTS, CARD)] if alone else []
    return older.union(*(folder.glob(pattern) for pattern in patterns))


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# --- the model card ------------------------------------------------------------------------------

OURS = "<!-- Pliant writes this card anew at each save, until this line is taken out. -->"
TEXT = """\
# {kind}

An adapter for {base}, of the part `{part}` of Pliant {version}: {numbers:,} trained parameters,
{size:,} bytes. It changes nothing in its base, and comes off without a trace.

```python
import pliant.{part}
from pliant.adapters import Adapter

adapter = Adapter.from_pretrained(model, "folder-or-hub-name")
```

Loading checks that `model` is the base this was trained on: {base_facts}.

```json
{config}
```
"""


def _write_card(path: Path, card: str) -> None:
    """Write the card, unless the user has made it their own by removing our last line."""
    if not path.exists() or OURS in path.read_text(errors="replace"):
        write_file(path, card.encode())


def model_card(index: Index, numbers: int, size: int) -> str:
    hub_name = index.base.name if index.base.name not in embedded() else ""
    link = f"[{hub_name}](https://huggingface.co/{hub_name})" if hub_name else ""
    data = ModelCardData(
        library_name="pliant",
        base_model=hub_name or None,
        base_model_relation="adapter" if hub_name else None,
        tags=["pliant", "adapter", index.part],
    )
    text = TEXT.format(
        kind=index.kind,
        part=index.part,
        version=index.pliant,
        base=link or index.base.name or index.base.model,
        numbers=numbers,
        size=size,
        base_facts=_facts(index),
        config=json.dumps(index.config, indent=2),
    )
    return f"---\n{data.to_yaml()}\n---\n\n{text}\n{OURS}\n"


def _facts(index: Index) -> str:
    tensors = sum(index.base.shapes.values())
    sampled = f"{len(index.base.samples)} of them sampled" if index.base.samples else index.base.why
    return f"`{index.base.model}`, {tensors} tensors ({sampled})"
