"""From an attached adapter to its folder, and back."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from pliant import __version__
from pliant.adapters import files
from pliant.adapters.card import model_card
from pliant.adapters.fingerprint import Fingerprint, fingerprint
from pliant.errors import AdapterError, CorruptFile, WrongBase

if TYPE_CHECKING:
    from pliant.adapters.life import Adapter

A = TypeVar("A", bound="Adapter")
EXTRA = "_extra_state"  # how torch ends the keys of what is no tensor


def save(adapter: Adapter, folder: Path, *, here: bool = True) -> None:
    """Write the adapter to `folder`; where its weights are sharded, all processes must call this,
    and those in which `here` is False only lend their shards."""
    state = adapter.state_dict()
    tensors = {k: _whole(v) for k, v in state.items() if not k.endswith(EXTRA)}
    _check_within_reach(adapter, tensors)
    if not here:
        return
    weights, name, digest = files.packed(tensors)
    index = files.Index(
        format=files.FORMAT,
        pliant=__version__,
        part=adapter.part,
        kind=type(adapter).__name__,
        config=asdict(adapter.config),
        state={k: v for k, v in state.items() if k.endswith(EXTRA)},
        weights=name,
        sha256=digest,
        base=adapter.fingerprint(),
    )
    numbers = sum(t.numel() for t in tensors.values())
    files.write(folder, index, weights, model_card(index, numbers, len(weights)))


def load(cls: type[A], model: nn.Module, source: str | Path, insist: bool, **hub: Any) -> A:
    """A loose adapter for `model` with what `source` holds."""
    folder = files.locate(source, **hub)
    saved = files.read(folder)
    kind = _class_of(saved.index, cls, folder)
    config = _config(kind.config_class, saved.index.config, folder)
    if not insist:
        _check_base(fingerprint(model), saved.index.base, folder)
    adapter = kind(model, config)
    _check_fits(adapter, saved)
    take(adapter, saved)
    return adapter


def restore(adapter: Adapter, source: str | Path, insist: bool, **hub: Any) -> None:
    """Fill `adapter` with what `source` holds, in place; on any error it is as it was."""
    take(adapter, fitting(adapter, source, insist, **hub))


def fitting(adapter: Adapter, source: str | Path, insist: bool = False, **hub: Any) -> files.Saved:
    """What `source` holds, if `adapter` can take it up; nothing is changed."""
    folder = files.locate(source, **hub)
    saved = files.read(folder)
    _class_of(saved.index, type(adapter), folder)
    if _config(adapter.config_class, saved.index.config, folder) != adapter.config:
        raise AdapterError(
            f"{folder}: saved with another configuration, {saved.index.config}, than this "
            f"adapter's, {asdict(adapter.config)}"
        )
    if adapter.name and not insist:
        _check_base(adapter.fingerprint(), saved.index.base, folder)
    _check_fits(adapter, saved)
    return saved


def take(adapter: Adapter, saved: files.Saved) -> None:
    """Fill `adapter` with what fits it, in place; on any error it is as it was."""
    own = adapter.state_dict()
    before = {k: v.clone() if isinstance(v, Tensor) else deepcopy(v) for k, v in own.items()}
    placed = {k: _as_sharded(v, own[k]) for k, v in saved.tensors.items()}
    try:
        adapter.load_state_dict({**placed, **saved.index.state})
    except Exception as error:  # of a part's own `set_extra_state`, for what it does not know
        adapter.load_state_dict(before)
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CorruptFile(f"{saved.folder}: cannot be taken up ({reason})") from error


def _class_of(index: files.Index, cls: type[A], folder: Path) -> type[A]:
    for kind in _family(cls):
        if (getattr(kind, "part", ""), kind.__name__) == (index.part, index.kind):
            return kind
    raise AdapterError(
        f"{folder}: holds a {index.kind} of pliant.{index.part}, which is no {cls.__name__} (or "
        f"pliant.{index.part} has not been imported yet)"
    )


def _family(cls: type[A]) -> Iterator[type[A]]:
    yield cls
    for child in cls.__subclasses__():
        yield from _family(child)


# --- what can be wrong ---------------------------------------------------------------------------


def _config(config_class: type, values: dict[str, Any], folder: Path) -> Any:
    unknown = values.keys() - config_class.__dataclass_fields__.keys()  # type: ignore[attr-defined]
    if unknown:
        raise CorruptFile(
            f"{folder}: this version knows no setting {min(unknown)!r} of {config_class.__name__}"
        )
    try:
        return TypeAdapter(config_class).validate_python(values)
    except ValidationError as error:
        raise CorruptFile(f"{folder}: its configuration: {files.first_line(error)}") from error


def _check_base(found: Fingerprint, trained_on: Fingerprint, folder: Path) -> None:
    differences = trained_on.differences(found)
    if differences:
        raise WrongBase(
            f"{folder}: was trained on another base than this one ({trained_on.name or 'a'} "
            f"{trained_on.model}): {differences}. Load it on its own base, or pass insist=True"
        )


def _check_fits(adapter: Adapter, saved: files.Saved) -> None:
    own = adapter.state_dict()
    tensors = {k: v for k, v in own.items() if not k.endswith(EXTRA)}
    _check_tensors(saved.tensors, tensors, saved.folder)
    if own.keys() - tensors.keys() != saved.index.state.keys():
        raise CorruptFile(f"{saved.folder}: keeps {sorted(saved.index.state)} besides its tensors")


def _check_tensors(found: dict[str, Tensor], own: dict[str, Tensor], folder: Path) -> None:
    if found.keys() != own.keys():
        only = sorted(found.keys() ^ own.keys())
        raise CorruptFile(f"{folder}: its tensors are not this adapter's; in one only: {only}")
    for name, tensor in found.items():
        if tensor.shape != own[name].shape:
            shapes = f"{list(tensor.shape)}, and this adapter's is {list(own[name].shape)}"
            raise CorruptFile(f"{folder}: {name} is {shapes}")
        if tensor.is_floating_point() != own[name].is_floating_point():
            raise CorruptFile(f"{folder}: {name} is {tensor.dtype}, not {own[name].dtype}")
        if tensor.is_floating_point() and tensor.isnan().any():
            raise CorruptFile(f"{folder}: {name} holds NaN: its training had diverged")


# --- sharded adapters ----------------------------------------------------------------------------


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def shapes(state: dict[str, Any]) -> dict[str, torch.Size]:
    return {k: v.shape for k, v in state.items() if isinstance(v, Tensor)}


def _check_within_reach(adapter: Adapter, tensors: dict[str, Tensor]) -> None:
    """DeepSpeed's ZeRO-3 and the first FSDP leave flat shards, or nothing, where weights were."""
    if adapter._link is None:
        return
    if added := sorted(tensors.keys() - adapter._link.shapes.keys()):
        raise AdapterError(
            f"{type(adapter).__name__}: something was built into it after it was attached, and it "
            f"is no more what was trained ({added[0]}): get_peft_model comes before attaching"
        )
    if shapes(tensors) != adapter._link.shapes:
        raise AdapterError(
            f"{type(adapter).__name__}: its weights are flattened into shards and cannot be saved; "
            "train it with DDP or FSDP version 2, which keep them whole"
        )


def _as_sharded(tensor: Tensor, own: Tensor) -> Tensor:
    if not hasattr(own, "full_tensor"):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(own, DTensor)
    return distribute_tensor(tensor.to(own.device), own.device_mesh, own.placements)
