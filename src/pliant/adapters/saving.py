"""Saves an attached adapter to a folder, and loads it again."""

from __future__ import annotations

import re
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pliant import __version__
from pliant.adapters import files
from pliant.adapters.fingerprint import Fingerprint, fingerprint
from pliant.adapters.local_bases import note_place
from pliant.errors import AdapterError, CorruptFile, WrongBase

if TYPE_CHECKING:
    from pliant.adapters.adapter import Adapter

A = TypeVar("A", bound="Adapter")
FACTORIES = {torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.eye}
LEAST_ALLOWANCE = 10_000_000  # numbers: what constructors use besides, on a large model too
EXTRA = "_extra_state"  # the end of torch's keys for state that is no tensor


def save(adapter: Adapter, folder: Path, *, here: bool = True) -> None:
    """Write the adapter to `folder`.

    If its weights are sharded, all processes must call this; those with `here=False` only
    contribute their shards.
    """
    state = adapter.state_dict()
    tensors = {k: gathered(v) for k, v in state.items() if not k.endswith(EXTRA)}
    _check_complete(adapter, tensors)
    if not here:
        return
    weights, name, digest = files.serialize(tensors)
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
    files.write(folder, index, weights, sum(t.numel() for t in tensors.values()))
    if adapter.name:
        place = getattr(getattr(adapter.base, "config", None), "_name_or_path", None)
        note_place(asdict(index.base), place)


def load(cls: type[A], model: nn.Module, source: str | Path, insist: bool, **hub: Any) -> A:
    """A new, detached adapter for `model`, loaded from `source`."""
    saved = files.read(files.locate(source, **hub))
    kind = _class_of(saved, cls)
    config = config_of(saved, kind.config_class)
    if not insist:
        _check_base(saved, fingerprint(model))
    with _Allowance(saved):
        adapter = kind(model, config)
    saved = _without_retired_tensors(adapter, saved)
    _check_state(adapter, saved)
    load_state(adapter, saved)
    return adapter


def read_matching(
    adapter: Adapter, source: str | Path, insist: bool = False, **hub: Any
) -> files.Saved:
    """Read `source` and check that `adapter` can load it; nothing changes."""
    saved = files.read(files.locate(source, **hub))
    _class_of(saved, type(adapter))
    if config_of(saved, adapter.config_class) != adapter.config:
        raise AdapterError(
            f"{saved.folder}: saved with another configuration, {saved.index.config}, than this "
            f"adapter's, {asdict(adapter.config)}"
        )
    if adapter.name and not insist:
        _check_base(saved, adapter.fingerprint())
    saved = _without_retired_tensors(adapter, saved)
    _check_state(adapter, saved)
    return saved


def load_state(adapter: Adapter, saved: files.Saved) -> None:
    """Load a state that was checked into `adapter`, in place; an error leaves it unchanged."""
    current = adapter.state_dict()
    before = {k: v.clone() if isinstance(v, Tensor) else deepcopy(v) for k, v in current.items()}
    tensors = {k: shard_like(v, current[k]) for k, v in saved.tensors.items()}
    try:
        adapter.load_state_dict({**tensors, **saved.index.state})
    except Exception as error:  # from the adapter's own `set_extra_state`
        adapter.load_state_dict(before)
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CorruptFile(f"{saved.folder}: cannot be loaded ({reason})") from error


def _class_of(saved: files.Saved, cls: type[A]) -> type[A]:
    index = saved.index
    for kind in _with_subclasses(cls):
        if (getattr(kind, "part", ""), kind.__name__) == (index.part, index.kind):
            return kind
    raise AdapterError(
        f"{saved.folder}: holds a {index.kind} of pliant.{index.part}, which is no {cls.__name__} "
        f"(or pliant.{index.part} has not been imported yet)"
    )


def _with_subclasses(cls: type[A]) -> Iterator[type[A]]:
    yield cls
    for child in cls.__subclasses__():
        yield from _with_subclasses(child)


# --- checks --------------------------------------------------------------------------------------


class _Allowance(TorchFunctionMode):
    """In this context, tensors are created only up to about what the file holds: its configuration
    may promise any size, and is compared with its weights when they are there."""

    def __init__(self, saved: files.Saved) -> None:
        super().__init__()
        self._folder, self._stored = saved.folder, sum(t.numel() for t in saved.tensors.values())
        self._left = max(LEAST_ALLOWANCE, 4 * self._stored)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in FACTORIES:
            plain = {
                name: value for name, value in kwargs.items() if name in ("size", "fill_value")
            }
            try:
                self._left -= func(*args, **plain, device="meta").numel()
            except (OverflowError, RuntimeError, TypeError):  # more than can be counted
                self._left = -1
            if self._left < 0:
                raise CorruptFile(
                    f"{self._folder}: its configuration needs far more parameters than the "
                    f"{self._stored:,} that its weights hold"
                )
        return func(*args, **kwargs)


def without_retired(config_class: type, values: dict[str, Any]) -> dict[str, Any]:
    """Without settings that no longer exist, if a file has them at the value that did nothing."""
    retired: dict[str, Any] = getattr(config_class, "RETIRED", {})
    return {k: v for k, v in values.items() if k not in retired or retired[k] != v}


def _without_retired_tensors(adapter: Adapter, saved: files.Saved) -> files.Saved:
    """Without tensors that earlier versions saved."""
    if not adapter.retired_tensors:
        return saved
    retired = re.compile(adapter.retired_tensors)
    tensors = {k: v for k, v in saved.tensors.items() if not retired.fullmatch(k)}
    return replace(saved, tensors=tensors)


def config_of(saved: files.Saved, config_class: type) -> Any:
    """The settings in an adapter's folder, checked."""
    folder, values = saved.folder, without_retired(config_class, saved.index.config)
    unknown = values.keys() - config_class.__dataclass_fields__.keys()  # type: ignore[attr-defined]
    if unknown:
        raise CorruptFile(
            f"{folder}: this version knows no setting {min(unknown)!r} of {config_class.__name__}"
        )
    from pydantic import TypeAdapter, ValidationError  # not needed to attach

    try:
        return TypeAdapter(config_class).validate_python(values)
    except ValidationError as error:
        raise CorruptFile(f"{folder}: invalid configuration: {files.first_fault(error)}") from error


def _check_base(saved: files.Saved, base: Fingerprint) -> None:
    trained_on = saved.index.base
    if differences := trained_on.differences(base):
        raise WrongBase(
            f"{saved.folder}: was trained on another base than this one ({trained_on.name or 'a'} "
            f"{trained_on.model}): {differences}. Load it on its own base; in Python, insist=True "
            "loads it on this one"
        )


def _check_state(adapter: Adapter, saved: files.Saved) -> None:
    expected = adapter.state_dict()
    tensors = {k: v for k, v in expected.items() if not k.endswith(EXTRA)}
    _check_tensors(saved.tensors, tensors, saved.folder)
    extra = sorted(expected.keys() - tensors.keys())
    if extra != sorted(saved.index.state):
        raise CorruptFile(
            f"{saved.folder}: holds the extra state {sorted(saved.index.state)}, and this adapter "
            f"expects {extra}"
        )


def _check_tensors(tensors: dict[str, Tensor], expected: dict[str, Tensor], folder: Path) -> None:
    if tensors.keys() != expected.keys():
        difference = sorted(tensors.keys() ^ expected.keys())
        raise CorruptFile(
            f"{folder}: its tensors are not this adapter's; only one of them has {difference}"
        )
    for name, tensor in tensors.items():
        own = expected[name]
        if tensor.shape != own.shape:
            raise CorruptFile(
                f"{folder}: {name} has shape {list(tensor.shape)}, and this adapter's has "
                f"{list(own.shape)}"
            )
        if tensor.is_floating_point() != own.is_floating_point():
            raise CorruptFile(f"{folder}: {name} is {tensor.dtype}, not {own.dtype}")
        files.check_finite(tensor, name, folder)


# --- sharded adapters ----------------------------------------------------------------------------


def shard_like(tensor: Tensor, own: Tensor) -> Tensor:
    """The tensor, sharded over processes as `own` is."""
    if not hasattr(own, "full_tensor"):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(own, DTensor)
    return distribute_tensor(tensor.to(own.device), own.device_mesh, own.placements)


def tensor_shapes(state: dict[str, Any]) -> dict[str, torch.Size]:
    return {k: v.shape for k, v in state.items() if isinstance(v, Tensor)}


def gathered(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded; every process must call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _check_complete(adapter: Adapter, tensors: dict[str, Tensor]) -> None:
    """DeepSpeed's ZeRO-3 and FSDP 1 replace weights by flat shards, or by nothing."""
    if adapter._link is None:
        return
    if added := sorted(tensors.keys() - adapter._link.shapes.keys()):
        raise AdapterError(
            f"{type(adapter).__name__}: gained {added[0]} after it was attached, so it is no "
            "longer the adapter that was trained: call get_peft_model before attaching"
        )
    if tensor_shapes(tensors) != adapter._link.shapes:
        raise AdapterError(
            f"{type(adapter).__name__}: its weights are flattened into shards and cannot be saved; "
            "train it with DDP or FSDP version 2, which keep their shapes"
        )
