"""An expert's folder, in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast, get_type_hints

import torch
from peft import PeftConfig
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialized
from torch import Tensor, nn

from pliant.adapters import Fingerprint
from pliant.adapters.local_bases import noted_place
from pliant.errors import AdapterError, CorruptFile, InvalidInput, UnsupportedModel
from pliant.experts.config import TYPE, SVFConfig
from pliant.files import locked, write_file
from pliant.loading import public_name

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
PREFIX, SUFFIX = "base_model.model.", ".svf_z.weight"


def write(
    folder: Path, changes: Mapping[str, Tensor], settings: Mapping[str, Any], card: str
) -> None:
    """Write the files, each completely or not at all."""
    if folder.is_file():
        raise InvalidInput(f"{folder} is a file: name a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        base = public_name(settings.get("base_model_name_or_path") or "") or None
        public = {**settings, "base_model_name_or_path": base}
        content = json.dumps(public, indent=2, sort_keys=True)
        with locked(folder):
            write_file(folder / WEIGHTS, serialized(as_saved(changes), {"format": "pt"}))
            write_file(folder / CONFIG, content.encode())
            if not (folder / CARD).is_file():
                write_file(folder / CARD, card.encode())
    except OSError as error:
        raise AdapterError(f"{folder}: cannot be written ({error.strerror or error})") from error


def as_saved(changes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Under the names that PEFT gives them."""
    return {f"{PREFIX}{path}{SUFFIX}": d.contiguous() for path, d in changes.items()}


def read_settings(folder: Path) -> dict[str, Any]:
    """The content of an expert's configuration; other adapters are refused."""
    if not folder.is_dir():
        raise AdapterError(f"{folder}: no such folder")
    path = folder / CONFIG
    if not path.is_file():
        inside = sorted(each.parent.name for each in folder.glob(f"*/{CONFIG}"))
        hint = f"; there are some in it: {', '.join(inside[:5])}" if inside else ""
        raise AdapterError(f"{folder}: holds no expert (looked for {CONFIG}){hint}")
    try:
        content = path.read_bytes()
        settings = json.loads(content)
        kind = settings["peft_type"]
        if settings.get("fingerprint") is not None:
            Fingerprint(**settings["fingerprint"])
    except OSError as error:
        raise AdapterError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptFile(f"{path}: is no configuration of PEFT") from error
    if kind != TYPE:
        raise InvalidInput(f"{folder}: holds a {kind} adapter, and no expert ({TYPE})")
    _check_fields(path, content)
    check_only_z(str(folder), settings)
    return cast(dict[str, Any], settings)


def base_name_of(settings: Mapping[str, Any]) -> str:
    """The name or folder from which the expert's base can be loaded; empty if it is unknown."""
    public = (settings.get("fingerprint") or {}).get("name")
    return str(public or settings.get("base_model_name_or_path") or "")


def base_place_of(settings: Mapping[str, Any]) -> str:
    """As `base_name_of`, or else the base's folder, if it is where it was on this machine.

    This path is for loading alone: nothing that is saved may name it.
    """
    return base_name_of(settings) or noted_place(settings.get("fingerprint") or {})


def _check_fields(path: Path, content: bytes) -> None:
    """Refuse fields that the configuration refuses; unknown ones are PEFT's to ignore."""
    from pydantic import ValidationError

    try:
        parsed = _schema().model_validate_json(content)
        SVFConfig(**{name: getattr(parsed, name) for name in parsed.model_fields_set})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CorruptFile(
            f"{path}: is no configuration of PEFT ({where}: {first['msg']})"
        ) from error
    except ValueError as error:
        raise CorruptFile(f"{path}: is no configuration of PEFT ({error})") from error


@cache
def _schema() -> Any:
    from pydantic import ConfigDict, create_model

    hints = {**get_type_hints(SVFConfig), "fingerprint": Fingerprint | None}
    types: dict[str, Any] = {each.name: (hints[each.name], None) for each in fields(SVFConfig)}
    return create_model("Settings", __config__=ConfigDict(strict=True), **types)


def check_only_z(name: str, settings: Mapping[str, Any]) -> None:
    if whole := settings.get("modules_to_save"):
        raise UnsupportedModel(
            f"{name}: has modules that were trained as a whole ({', '.join(sorted(whole))}), and "
            "these are no value that can be added: load it with PEFT"
        )


def read_changes(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    try:
        tensors = load_file(path)
    except FileNotFoundError as error:
        raise CorruptFile(f"{path}: missing") from error
    except OSError as error:
        raise AdapterError(f"{path}: cannot be read ({error.strerror or error})") from error
    except SafetensorError as error:
        raise CorruptFile(f"{path}: truncated or damaged ({error})") from error
    changes = {}
    for key, tensor in tensors.items():
        named = key.startswith(PREFIX) and key.endswith(SUFFIX)
        if not (named and tensor.dim() in (1, 2) and tensor.is_floating_point()):
            raise CorruptFile(f"{path}: {key} {list(tensor.shape)} is no z of an expert")
        change = tensor.float()
        if not torch.isfinite(change).all():
            raise CorruptFile(f"{path}: {key} holds NaN or infinity: its training had diverged")
        changes[key.removeprefix(PREFIX).removesuffix(SUFFIX)] = change
    if not changes:
        raise CorruptFile(f"{path}: is empty")
    return changes


def settings_of(config: SVFConfig, base: nn.Module) -> dict[str, Any]:
    """As PeftModel.save_pretrained writes them."""
    copy = PeftConfig.from_peft_type(**config.to_dict())
    copy.inference_mode = True
    if copy.base_model_name_or_path is None:
        copy.base_model_name_or_path = getattr(base, "name_or_path", None) or None
    mapping = None
    if copy.task_type is None:
        kind = type(base)
        mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    with TemporaryDirectory() as folder:
        copy.save_pretrained(folder, auto_mapping_dict=mapping)
        settings: dict[str, Any] = json.loads((Path(folder) / CONFIG).read_text())
    return settings
