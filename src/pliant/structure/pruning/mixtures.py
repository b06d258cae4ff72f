"""What pruning several parts at once should lose, from what was measured.

    losses = Losses({"channels": [(0.2, 0.1), (0.4, 0.3)], "layers": [(0.3, 0.3)]}, mixtures)
    losses.predict({"channels": 0.2, "layers": 0.15})

Losses are of log-perplexity. A part's own loss grows as a power of its share, through the points at
which the part was pruned alone. Those of several parts add up, and what mixtures lost beyond that
is ascribed to every pair of parts, in proportion to the geometric mean of what the two lose alone.
A part that cannot save half of the budget is measured in mixtures only: it loses what its mixtures
lose beyond their other parts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from pliant.structure.config import Part

EXPONENTS = (1.0, 4.0)
"""Bounds of the power with which a loss grows."""
LEAST = 1e-4
"""A loss below this, or a gain, counts as this."""
NEVER = 1e6
"""What all of a part would lose that has no measurement: it cannot save even half of the budget."""
LEAST_EXCESS = -1.0
"""Two parts that lose as much together lose no less than one of them alone."""

Shares = Mapping[Part, Tensor]


@dataclass(frozen=True, eq=False)
class Losses:
    """Predicts what shares of several parts lose together."""

    alone: Mapping[Part, Sequence[tuple[float, float]]]
    """For each part its shares and losses, in ascending order."""
    mixtures: Sequence[tuple[Mapping[Part, float], float]] = ()

    def predict(self, shares: Shares) -> Tensor:
        total, pairs = self._sums(shares)
        return total + self.excess * pairs

    @property
    def excess(self) -> float:
        """The share of the pairs' geometric means that mixtures lose, beside the sum; 0 if none was
        measured (least squares)."""
        products = squares = 0.0
        for shares, loss in self.mixtures:
            total, pairs = map(float, self._sums({p: torch.tensor(s) for p, s in shares.items()}))
            products += pairs * (max(loss, LEAST) - total)
            squares += pairs**2
        return max(products / squares, LEAST_EXCESS) if squares else 0.0

    def _sums(self, shares: Shares) -> tuple[Tensor, Tensor]:
        """Of the parts' own losses, and of the geometric means of every two that were measured."""
        each = {part: self._of_part(part, share) for part, share in shares.items()}
        nothing = torch.zeros_like(next(iter(each.values())))
        measured = [loss for part, loss in each.items() if self.alone.get(part)]
        pairs = ((a * b).sqrt() for a, b in combinations(measured, 2))
        return sum(each.values(), nothing), sum(pairs, nothing)

    def _of_part(self, part: Part, share: Tensor) -> Tensor:
        share = share.double()
        points = self.alone.get(part) or self._from_mixtures(part)
        measured = [(own, max(loss, LEAST)) for own, loss in points]
        if not measured:
            return NEVER * share
        (least, low), (most, high) = measured[0], measured[-1]
        power = 2.0
        if most > least:
            power = math.log(high / low) / math.log(most / least)
        low_power, high_power = EXPONENTS
        return high * (share / most) ** min(max(power, low_power), high_power)

    def _from_mixtures(self, part: Part) -> list[tuple[float, float]]:
        """What mixtures lose beyond their other parts, if all those were measured alone."""
        points = []
        for shares, loss in self.mixtures:
            others = {p: torch.tensor(s) for p, s in shares.items() if p != part}
            if part in shares and others and all(self.alone.get(p) for p in others):
                total, _ = self._sums(others)
                points.append((shares[part], loss - float(total)))
        return sorted(points)
