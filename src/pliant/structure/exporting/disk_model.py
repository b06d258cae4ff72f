"""A model whose weights stay on disk: it runs with the weights of one layer at a time in memory.

transformers reads the checkpoint, so that renamed and joined tensors are handled; those that it has
to convert are stored in a scratch folder. What lies outside the layers (embeddings, final norm,
head) is in memory while the model runs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pliant.anatomy import Anatomy
from pliant.anatomy.find import path_of
from pliant.errors import UnsupportedModel
from pliant.loading import load_model, torch_device
from pliant.structure.stock.lazy_state import LazyState


@dataclass(frozen=True, eq=False)
class Slot:
    """A place for a parameter, and how its value is read."""

    holder: nn.Module
    name: str
    read: Callable[[], Tensor]


class DiskModel:
    """A model without weights at hand, and where they are."""

    def __init__(self, model: Any, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        self.model, self.device = model, device
        self.anatomy = Anatomy.of(model)
        self._tensors = tensors
        self._names = _stored_names(model, tensors)
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if not buffer.is_meta:
                    module._buffers[name] = buffer.to(device)
        self.empty: dict[str, Tensor] = model.state_dict()
        self.parameters = sum(p.numel() for p in model.parameters())

    @classmethod
    def load(
        cls,
        source: str | Path,
        scratch: Path,
        *,
        dtype: str | torch.dtype = "auto",
        device: str | None = None,
    ) -> DiskModel:
        """The model of this name or folder; `scratch` holds tensors that had to be converted."""
        from accelerate.hooks import remove_hook_from_module

        place = torch_device(device or "cpu")
        assert place is not None
        with _quiet("accelerate.big_modeling"):  # it warns that weights are on disk
            model: Any = load_model(
                source, dtype=dtype, device_map={"": "disk"}, offload_folder=str(scratch)
            )
        hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
        maps = (getattr(hook, "weights_map", None) for hook in hooks)
        tensors = next(each.dataset for each in maps if each is not None)
        remove_hook_from_module(model, recurse=True)
        return cls(model, tensors, place)

    @property
    def state(self) -> LazyState:
        """The tensors of its `state_dict`, read when they are asked for."""
        return LazyState({key: partial(self.read, key) for key in self.empty})

    def read(self, name: str) -> Tensor:
        """A tensor of the `state_dict`, in the dtype that the model has it in."""
        own = self.empty[name]
        if not own.is_meta:
            return own
        return self._tensors[self._names[name]].to(own.dtype)

    @contextmanager
    def running(self, more: Sequence[tuple[int, Slot]] = ()) -> Iterator[nn.Module]:
        """Inside the block the model can be called; `more` are slots of adapters, by layer."""
        outside, by_layer = self._slots()
        for index, slot in more:
            by_layer[index].append(slot)
        with ExitStack() as stack:
            stack.enter_context(_filled(outside, self.device))
            for layer, slots in zip(self.anatomy.layers, by_layer, strict=True):
                stack.enter_context(_filled_while_it_runs(layer, slots, self.device))
            try:
                yield self.model
            except (NotImplementedError, RuntimeError) as error:
                if "meta" not in str(error):
                    raise
                raise UnsupportedModel(
                    f"{type(self.model).__name__} uses weights of a layer outside of it, so it "
                    "cannot run from disk: export it in memory"
                ) from error

    def _slots(self) -> tuple[list[Slot], list[list[Slot]]]:
        """Of the modules outside the layers, and of each layer."""
        layers = [list(self._slots_in(layer)) for layer in self.anatomy.layers]
        inside = {id(m) for layer in self.anatomy.layers for m in layer.modules()}
        outside = [s for s in self._slots_in(self.model) if id(s.holder) not in inside]
        return outside, layers

    def _slots_in(self, root: nn.Module) -> Iterator[Slot]:
        start = path_of(self.model, root)
        for path, module in root.named_modules():
            if getattr(module, "hidden_from_state_dict", False):
                return  # adapters, which come last
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.is_meta:
                    key = ".".join(part for part in (start, path, name) if part)
                    yield Slot(module, name, partial(self.read, key))


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _stored_names(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """For each name of a parameter the one under which it is stored: tied ones are stored once."""
    stored = set(tensors)
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {
        name: next((other for other in own if other in stored), name)
        for own in names.values()
        for name in own
    }


@contextmanager
def _filled(slots: Sequence[Slot], device: torch.device) -> Iterator[None]:
    """The slots hold their values inside the block; tied ones hold one and the same."""
    before = [slot.holder._parameters[slot.name] for slot in slots]
    values: dict[int, nn.Parameter] = {}
    try:
        for slot, empty in zip(slots, before, strict=True):
            if id(empty) not in values:
                values[id(empty)] = nn.Parameter(slot.read().to(device), requires_grad=False)
            slot.holder._parameters[slot.name] = values[id(empty)]
        yield
    finally:
        for slot, empty in zip(slots, before, strict=True):
            slot.holder._parameters[slot.name] = empty


@contextmanager
def _filled_while_it_runs(
    layer: nn.Module, slots: Sequence[Slot], device: torch.device
) -> Iterator[None]:
    running: list[ExitStack] = []

    def fill(*_: Any) -> None:
        stack = ExitStack()
        stack.enter_context(_filled(slots, device))
        running.append(stack)

    def empty(*_: Any) -> None:
        running.pop().close()

    handles = [
        layer.register_forward_pre_hook(fill, prepend=True),
        layer.register_forward_hook(empty, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        while running:
            running.pop().close()
