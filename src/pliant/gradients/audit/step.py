"""One step of a contender, measured: how close its gradient is to the full one, and what it costs.

Gradients are compared in direction, length, bias over many draws, and variance. Draws are summed
one by one: however many there are, two gradients are held beside the current one. Times are taken
turn by turn in one process, beside the others'.
"""

from __future__ import annotations

import math
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

from pliant.gradients.audit.contenders import (
    STANDARD,
    Batch,
    Contender,
    Field,
    clear_gradients,
    trained,
)
from pliant.stats import Band, bootstrap


@dataclass(frozen=True)
class Quality:
    """Of one contender's gradients; 1, 1, 1, 0 and 0 for the full gradient itself."""

    cosine: Band
    """One draw's with the full gradient: the mean over draws and batches."""
    norm: float
    """Its length over the full gradient's, on average."""
    mean_cosine: float
    """The mean of all draws with the full gradient: below 1 is bias, or too few draws."""
    bias: float
    """The length of the expected error, over the full gradient's length: what more draws would not
    remove. The part that is only noise of so many draws is taken off."""
    variance: float
    """The expected squared distance of a draw from the mean, over the full gradient's squared
    length."""


@dataclass(frozen=True)
class _Draws:
    """One batch's."""

    cosines: list[float]
    norms: list[float]
    mean_cosine: float
    bias: float
    variance: float


class GradientComparison:
    """Collects the draws of each batch, which `quality` summarizes."""

    def __init__(self, field: Field, draws: int) -> None:
        self.field, self.draws = field, draws
        self.parameters = trained(field.model)
        self.results: dict[Contender, list[_Draws]] = {c: [] for c in field.contenders}

    def add(self, batch: Batch) -> None:
        """Compare every contender's draws on this batch with the full gradient."""
        full = self._gradient(STANDARD, batch, 0)
        for contender in self.field.contenders:
            count = self.draws if contender.draws else 1
            self.results[contender].append(self._drawn(contender, batch, full, count))

    def _drawn(self, contender: Contender, batch: Batch, full: list[Tensor], count: int) -> _Draws:
        total: list[Tensor] | None = None
        length = math.sqrt(_dot(full, full))
        norms, cosines = [], []
        for draw in range(count):
            gradient = self._gradient(contender, batch, draw)
            norm = math.sqrt(_dot(gradient, gradient))
            norms.append(norm)
            cosines.append(_ratio(_dot(gradient, full), norm * length))
            if total is None:
                total = gradient
            else:
                for a, b in zip(total, gradient, strict=True):
                    a += b
        assert total is not None
        for a in total:
            a /= count
        return _summed(total, full, norms, cosines)

    def _gradient(self, contender: Contender, batch: Batch, draw: int) -> list[Tensor]:
        """With the same dropout for all that run the whole batch."""
        clear_gradients(self.field.model)
        torch.manual_seed(0)
        self.field.step(contender, batch, draw)
        return _take_gradients(self.parameters)

    def quality(self, contender: Contender) -> Quality:
        draws = self.results[contender]
        cosines = np.array([c for d in draws for c in d.cosines])
        batches = [i for i, d in enumerate(draws) for _ in d.cosines]
        clusters = batches if len(draws) > 1 else None
        return Quality(
            cosine=bootstrap(lambda at: float(cosines[at].mean()), len(cosines), clusters=clusters),
            norm=float(np.mean([n for d in draws for n in d.norms])),
            mean_cosine=float(np.mean([d.mean_cosine for d in draws])),
            bias=float(np.mean([d.bias for d in draws])),
            variance=float(np.mean([d.variance for d in draws])),
        )


def _summed(
    mean: list[Tensor], full: list[Tensor], norms: list[float], cosines: list[float]
) -> _Draws:
    count = len(norms)
    mean_2, full_2, across = _dot(mean, mean), _dot(full, full), _dot(mean, full)
    spread = sum(norm * norm for norm in norms) - count * mean_2
    variance = max(0.0, spread / (count - 1)) if count > 1 else 0.0
    error_2 = max(0.0, mean_2 - 2 * across + full_2 - variance / count)
    return _Draws(
        cosines,
        [_ratio(norm, math.sqrt(full_2)) for norm in norms],
        _ratio(across, math.sqrt(mean_2 * full_2)),
        _ratio(math.sqrt(error_2), math.sqrt(full_2)),
        _ratio(variance, full_2),
    )


def _take_gradients(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Remove and return the gradients, in fp32 or more; zeros where there is none."""
    gradients = []
    for p in parameters:
        grad, p.grad = p.grad, None
        if grad is None:
            grad = torch.zeros_like(p)
        gradients.append(grad.detach() if grad.dtype == torch.float64 else grad.detach().float())
    return gradients


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return sum(float((x.double() * y).sum()) for x, y in zip(a, b, strict=True))


def _ratio(a: float, b: float) -> float:
    return a / b if b else 0.0


# --- cost -----------------------------------------------------------------------------------------


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
