"""Writes a checkpoint shard by shard, a tensor at a time, so that it may be larger than memory.

The tensors get the names and the form in which transformers saves them. A shard has its name only
once it is whole, so the shards that are there are those that need not be written again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from pliant.structure.stock.lazy_state import State

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
INDEX = "model.safetensors.index.json"
PART = ".part"  # the end of the name of a shard that is being written


@dataclass(frozen=True)
class Stored:
    """A tensor of the checkpoint."""

    name: str
    unit: int
    """Which of the units it is made of."""
    dtype: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True, eq=False)
class Shards:
    """What a checkpoint consists of."""

    model: Any
    """The model without weights: it knows in which form its tensors are saved."""
    units: list[tuple[str, ...]]
    """Tensors of the model that are converted together; nearly always one."""
    files: dict[str, list[Stored]]

    @classmethod
    def plan(cls, model: Any, empty: State, limit: int) -> Shards:
        """The shards of at most `limit` bytes, or of one tensor, for a model whose tensors have the
        shapes and dtypes of `empty`, which are on the meta device."""
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
        keys = [key for key in empty if key not in tied and key not in ignored]
        units = _units(model, {key: empty[key].to("meta") for key in keys})
        stored = [
            Stored(name, number, DTYPES[t.dtype], tuple(t.shape), t.numel() * t.element_size())
            for number, unit in enumerate(units)
            for name, t in _saved_form(model, {k: empty[k].to("meta") for k in unit}).items()
        ]
        return cls(model, units, _named(_packed(stored, limit)))

    @property
    def total_bytes(self) -> int:
        return sum(each.bytes for stored in self.files.values() for each in stored)

    def missing(self, folder: Path) -> list[str]:
        """The shards that `folder` does not have yet."""
        return [name for name in self.files if not (folder / name).is_file()]

    def write(self, folder: Path, name: str, state: State) -> None:
        """Write one shard; `state` gives the model's tensors."""
        unfinished = folder / (name + PART)
        with unfinished.open("wb") as file:
            stored = self.files[name]
            file.write(_header(stored))
            for each, tensor in self._tensors(stored, state):
                assert DTYPES[tensor.dtype] == each.dtype and tuple(tensor.shape) == each.shape
                file.write(memoryview(_bytes(tensor)))
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(folder / name)

    def write_index(self, folder: Path) -> None:
        if len(self.files) == 1:
            return
        names = {each.name: file for file, stored in self.files.items() for each in stored}
        parameters = sum(p.numel() for p in self.model.parameters())
        metadata = {"total_parameters": parameters, "total_size": self.total_bytes}
        content = json.dumps({"metadata": metadata, "weight_map": names}, indent=2, sort_keys=True)
        (folder / INDEX).write_text(content + "\n", encoding="utf-8")

    def _tensors(self, stored: Sequence[Stored], state: State) -> Iterator[tuple[Stored, Tensor]]:
        """The tensors in this order; those that are made together follow each other."""
        last, form = -1, dict[str, Tensor]()
        for each in stored:
            if each.unit != last:
                form.clear()
                unit = {key: state[key].cpu() for key in self.units[each.unit]}
                last, form = each.unit, dict(_saved_form(self.model, unit))
                del unit
            yield each, form.pop(each.name)


def _units(model: Any, empty: dict[str, Tensor]) -> list[tuple[str, ...]]:
    """Each tensor alone, or all of a layer where some are joined when they are saved."""
    whole = {name: t.shape for name, t in _saved_form(model, empty).items()}
    try:
        alone = [_saved_form(model, {key: tensor}) for key, tensor in empty.items()]
    except Exception:  # whatever a conversion of a part of its tensors may raise
        alone = []
    if {name: t.shape for form in alone for name, t in form.items()} == whole:
        return [(key,) for key in empty]
    groups: dict[str, list[str]] = {}
    for key in empty:
        parts = key.split(".")
        index = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
        groups.setdefault(".".join(parts[: index + 1]), []).append(key)
    return [tuple(keys) for keys in groups.values()]


def _saved_form(model: Any, state: dict[str, Tensor]) -> Mapping[str, Tensor]:
    """As transformers saves these tensors: under other names, or split."""
    form: Mapping[str, Tensor] = revert_weight_conversion(model, state)
    return form


def _packed(stored: Sequence[Stored], limit: int) -> list[list[Stored]]:
    shards: list[list[Stored]] = [[]]
    room = limit
    for each in stored:
        if each.bytes > room and shards[-1]:
            shards.append([])
            room = limit
        shards[-1].append(each)
        room -= each.bytes
    return shards


def _named(shards: list[list[Stored]]) -> dict[str, list[Stored]]:
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    count = len(shards)
    return {
        f"model-{number:05}-of-{count:05}.safetensors": stored
        for number, stored in enumerate(shards, start=1)
    }


def _header(stored: Sequence[Stored]) -> bytes:
    """What a safetensors file begins with."""
    content: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for each in stored:
        assert each.bytes == prod(each.shape) * _SIZES[each.dtype]
        content[each.name] = {
            "dtype": each.dtype,
            "shape": list(each.shape),
            "data_offsets": [start, start := start + each.bytes],
        }
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


_SIZES = {name: torch.empty(0, dtype=dtype).element_size() for dtype, name in DTYPES.items()}


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
