"""How near a contender's gradient is to the full one of the same batch: its direction, its length,
its bias over many draws, and its spread.

Draws are summed as they come: two gradients are held beside the one that is being made, however
many draws there are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from pliant.gradients.audit.contenders import STANDARD, Batch, Contender, Field
from pliant.gradients.audit.snapshot import clear_gradients, trained
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


class Judge:
    """Collects what `quality` sums up, batch by batch."""

    def __init__(self, field: Field, draws: int) -> None:
        self.field, self.draws = field, draws
        self.parameters = trained(field.model)
        self.found: dict[Contender, list[_Draws]] = {c: [] for c in field.contenders}

    def see(self, batch: Batch) -> None:
        """Every contender's draws on this batch, each beside the full gradient."""
        full = self._gradient(STANDARD, batch, 0)
        for contender in self.field.contenders:
            count = self.draws if contender.draws else 1
            self.found[contender].append(self._drawn(contender, batch, full, count))

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
        """Dropout, where there is some, drops the same for all that run the whole batch."""
        clear_gradients(self.field.model)
        torch.manual_seed(0)
        self.field.step(contender, batch, draw)
        return _taken(self.parameters)

    def quality(self, contender: Contender) -> Quality:
        found = self.found[contender]
        cosines = np.array([c for one in found for c in one.cosines])
        batches = [i for i, one in enumerate(found) for _ in one.cosines]
        clusters = batches if len(found) > 1 else None
        return Quality(
            cosine=bootstrap(lambda at: float(cosines[at].mean()), len(cosines), clusters=clusters),
            norm=float(np.mean([n for one in found for n in one.norms])),
            mean_cosine=float(np.mean([one.mean_cosine for one in found])),
            bias=float(np.mean([one.bias for one in found])),
            variance=float(np.mean([one.variance for one in found])),
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


def _taken(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """The gradients out of their parameters, in fp32 or more; zeros where there is none."""
    found = []
    for p in parameters:
        grad, p.grad = p.grad, None
        if grad is None:
            grad = torch.zeros_like(p)
        found.append(grad.detach() if grad.dtype == torch.float64 else grad.detach().float())
    return found


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return sum(float((x.double() * y).sum()) for x, y in zip(a, b, strict=True))


def _ratio(a: float, b: float) -> float:
    return a / b if b else 0.0
