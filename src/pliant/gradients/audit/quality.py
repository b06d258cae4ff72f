"""How close a contender's gradient is to the full one of the same batch: direction, length, bias
over many draws, and variance.

Draws are summed one by one: however many there are, two gradients are held beside the current one.
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
