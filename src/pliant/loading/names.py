"""Where a name leads: an embedded model, a fetched one, a folder, a GGUF file, or the hub."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from pliant.errors import InvalidInput, ModelNotFound
from pliant.loading import catalogue

# The embedded models are files of this package: loading them needs no code of pliant.nano.
WEIGHTS = Path(__file__).parents[1] / "nano" / "weights"
HUB_NAME = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9]([\w.-]*\w)?(/\w([\w.-]*\w)?)?(?<!\.git)")
SPLIT = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
LORA_CONFIG = "adapter_config.json"
STOCK_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


@dataclass(frozen=True)
class Source:
    """Where a name leads: a folder on this machine, or a name on the hub."""

    name: str
    location: str
    kind: Literal["embedded", "fetched", "folder", "lora", "hub"]
    gguf: str = ""
    """The GGUF file in that place, if the model is one."""

    def __str__(self) -> str:
        return repr(self.name)

    @property
    def name_on_hub(self) -> str:
        """The name on the hub; empty for a place on this machine."""
        return self.name if public_name(self.name) and self.kind in ("hub", "lora") else ""

    @property
    def options(self) -> dict[str, Any]:
        """What `from_pretrained` needs besides the location."""
        return {"gguf_file": self.gguf} if self.gguf else {}


def resolve(name: str | Path, gguf_file: str | None = None) -> Source:
    """What a name means, in this order: embedded, folder or file, fetched, hub. Downloads nothing.

    `gguf_file` names one of several GGUF files in a folder, or on the hub.
    """
    text = str(name)
    path = os.path.expanduser(text)
    if gguf_file is not None:
        _check_gguf_file(gguf_file, text, path)
    if isinstance(name, str) and text in embedded():
        return Source(text, str(WEIGHTS / text), "embedded")
    if gguf_file is None and _is_lora(Path(path)):
        return Source(text, path, "lora")
    if os.path.isdir(path):
        return Source(text, path, "folder", _gguf_in(text, Path(path), gguf_file))
    if os.path.exists(path):
        file = Path(path)
        if file.suffix != ".gguf":
            raise ModelNotFound(f"{text!r} is a file: name the folder that holds config.json")
        return Source(text, str(file.parent), "folder", _whole(file.name))
    if isinstance(name, Path) or _looks_local(text):
        raise ModelNotFound(f"{text!r}: no such {'file' if text.endswith('.gguf') else 'folder'}")
    if text in catalogue.CATALOGUE:
        return Source(text, str(catalogue.path(text)), "fetched")
    if not HUB_NAME.fullmatch(text) or len(text) > 96:
        raise ModelNotFound(f"{text[:80]!r} is no model name{_valid_names()}")
    return Source(text, text, "hub", gguf_file or "")


def embedded() -> list[str]:
    """The names of the models that come with the package, smallest name first."""
    return sorted(folder.parent.name for folder in WEIGHTS.glob("*/config.json"))


def public_name(location: str) -> str:
    """The name by which anybody can load what was loaded from here; empty for a path."""
    folder = Path(location)
    fetched = folder.parent == catalogue.home() and folder.name in catalogue.CATALOGUE
    if folder.parent == WEIGHTS or fetched:
        return folder.name
    return location if HUB_NAME.fullmatch(location) and not folder.exists() else ""


def suggestion(name: str) -> str:
    """The end of an error about an unknown name."""
    near = get_close_matches(name.lower(), [*embedded(), *catalogue.CATALOGUE], n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _check_gguf_file(gguf_file: str, name: str, path: str) -> None:
    if not str(gguf_file).endswith(".gguf"):
        raise InvalidInput(f"gguf_file = {str(gguf_file)!r}: name a file that ends in .gguf")
    fetched = name in catalogue.CATALOGUE and not os.path.isdir(path)
    if name in embedded() or os.path.isfile(path) or fetched:
        raise InvalidInput(f"gguf_file goes with a folder or a hub name, and {name!r} is neither")


def _is_lora(folder: Path) -> bool:
    # os.path answers no where Path raises: a name may be too long for a file.
    config, lora = folder / "config.json", folder / LORA_CONFIG
    return os.path.isfile(lora) and not os.path.isfile(config)


def _gguf_in(name: str, folder: Path, wanted: str | None) -> str:
    """The GGUF file in a folder; empty if the folder holds a stock model."""
    if wanted is not None:
        if not (folder / wanted).is_file():
            raise ModelNotFound(f"{name!r} has no file {wanted!r}")
        return _whole(str(wanted))
    files = sorted(p.name for p in folder.glob("*.gguf") if not p.name.startswith("mmproj"))
    has_config = (folder / "config.json").is_file()
    if has_config and (not files or any(p for kind in STOCK_WEIGHTS for p in folder.glob(kind))):
        return ""
    if len(files) > 1:
        raise ModelNotFound(
            f"{name!r} holds {len(files)} GGUF files ({', '.join(files[:3])}, ...): "
            "name one, with its path or as gguf_file"
        )
    if not files:
        raise ModelNotFound(
            f"{name!r} is a folder without a config.json or a GGUF file, so it is no model"
        )
    return _whole(files[0])


def _whole(file: str) -> str:
    if SPLIT.search(file):
        raise ModelNotFound(
            f"{file!r} is one part of a split GGUF file, which transformers cannot load: join the "
            "parts with llama.cpp's llama-gguf-split --merge"
        )
    return file


def _looks_local(text: str) -> bool:
    no_hub_name = text.startswith((".", "/", "~")) or text.count("/") > 1
    return no_hub_name or text.endswith(("/", ".gguf", os.sep))


def _valid_names() -> str:
    own = " or ".join(repr(name) for name in embedded()) or "an embedded model"
    return f": give {own}, a local folder or GGUF file, or a name on the hub such as 'owner/model'"
