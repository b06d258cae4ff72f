"""What a step costs: its time beside the others', turn by turn in one process, and its memory."""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pliant.gradients.audit.contenders import STANDARD, Batch, Contender, Field
from pliant.gradients.audit.snapshot import clear_gradients, trained
from pliant.stats import Band, bootstrap


@dataclass(frozen=True)
class StepCost:
    """Of a forward and a backward pass (the optimizer's step is the same for all)."""

    seconds: float
    """The median of the turns."""
    speed: Band
    """Standard training's time over this one's: the median of the turns' own ratios."""
    memory: int
    """Bytes that are held at the peak, the gradients among them, and the weights not."""
    operations: float | None
    """As a share of standard training's: see `operations`."""


def costs(field: Field, batches: Sequence[Batch], turns: int) -> Mapping[Contender, StepCost]:
    """Each turn runs each contender once, so that disturbances of the machine affect all alike."""
    memory = {c: _memory(field, c, batches[0]) for c in field.contenders}
    shares = {c: operations(field, c) for c in field.contenders}
    seconds: dict[Contender, list[float]] = {c: [] for c in field.contenders}
    for turn in range(turns):
        first = turn % len(field.contenders)
        for contender in (*field.contenders[first:], *field.contenders[:first]):
            batch = batches[turn % len(batches)]
            seconds[contender].append(timed(field, contender, batch, turn))
    standard = np.array(seconds[STANDARD])
    return {
        c: StepCost(statistics.median(s), _speed(standard / np.array(s)), memory[c], shares[c])
        for c, s in seconds.items()
    }


def timed(field: Field, contender: Contender, batch: Batch, draw: int) -> float:
    clear_gradients(field.model)
    wait(field.model)
    begun = time.perf_counter()
    field.step(contender, batch, draw)
    wait(field.model)
    return time.perf_counter() - begun


def _speed(ratios: Any) -> Band:
    return bootstrap(lambda at: float(np.median(ratios[at])), len(ratios))


def operations(field: Field, contender: Contender) -> float | None:
    """Of the step that just ran, as a share of standard training's."""
    handle = field.handles.get(contender)
    if handle is not None:
        return handle.metrics().get("flops_of_standard")
    if contender.kind == "custom":
        return None
    scoring = 1 / 3 if contender.kind == "hardest_rows" else 0.0  # a forward pass of all rows
    return contender.share + scoring


def wait(model: nn.Module) -> None:
    for device in {p.device for p in model.parameters()}:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elif device.type == "mps":
            torch.mps.synchronize()


def _memory(field: Field, contender: Contender, batch: Batch) -> int:
    clear_gradients(field.model)
    if trained(field.model)[0].device.type == "cuda":
        return _on_cuda(field, contender, batch)
    with Peak() as peak:
        field.step(contender, batch)
        clear_gradients(field.model)
    return peak.most


def _on_cuda(field: Field, contender: Contender, batch: Batch) -> int:
    field.step(contender, batch)  # libraries allocate their workspaces
    clear_gradients(field.model)
    devices = {p.device for p in field.model.parameters() if p.device.type == "cuda"}
    wait(field.model)
    before = {device: torch.cuda.memory_allocated(device) for device in devices}
    for device in devices:
        torch.cuda.reset_peak_memory_stats(device)
    field.step(contender, batch)
    wait(field.model)
    return sum(torch.cuda.max_memory_allocated(d) - before[d] for d in devices)


class Peak(TorchDispatchMode):
    """Counts the bytes of all storages that are created inside and alive: now, and at the peak.

    What a kernel allocates and frees before it ends is not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = {_key(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        answer = func(*args, **kwargs)
        for tensor in tree_leaves(answer):
            if isinstance(tensor, Tensor) and _key(tensor) not in inputs:
                self._see(tensor.untyped_storage())
        return answer

    def _see(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        size = storage.nbytes()
        self._seen[key] = weakref.ref(storage, lambda _: self._forget(key, size))
        self.now += size
        self.most = max(self.most, self.now)

    def _forget(self, key: int, size: int) -> None:
        del self._seen[key]
        self.now -= size


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
