"""What pruning several parts at once should lose, from what was measured.

    losses = Losses({"channels": [(0.2, 0.1), (0.4, 0.3)], "layers": [(0.3, 0.3)]}, mixtures)
    losses.predict({"channels": 0.2, "layers": 0.15})

Losses are of log-perplexity. A part's own loss grows as a power of its share, through the points at
which the part was pruned alone. Those of several parts add up, and what mixtures lost beyond that
is ascribed to every pair of parts, in proportion to the geometric mean of what the two lose alone.
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
"""The loss of a part that was not measured: not even half of the budget can come of it."""
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
        """Of the parts' own losses, and of the geometric means of every two."""
        each = [self._of_part(part, share) for part, share in shares.items()]
        nothing = torch.zeros_like(each[0])
        pairs = ((a * b).sqrt() for a, b in combinations(each, 2))
        return sum(each, nothing), sum(pairs, nothing)

    def _of_part(self, part: Part, share: Tensor) -> Tensor:
        share = share.double()
        measured = [(own, max(loss, LEAST)) for own, loss in self.alone.get(part, ())]
        if not measured:
            return torch.where(share > 0, NEVER, 0.0).to(share)
        (least, low), (most, high) = measured[0], measured[-1]
        power = 2.0
        if most > least:
            power = math.log(high / low) / math.log(most / least)
        low_power, high_power = EXPONENTS
        return high * (share / most) ** min(max(power, low_power), high_power)
