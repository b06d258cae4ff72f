"""Remove units of a projection, and let those that stay take over what they can.

A projection maps features x to outputs; its units are groups of features (an MLP channel is one, a
head is as many as it is wide). `Statistics` sums up what the projection saw and should have given,
and `remove_units` chooses units whose loss costs least, given the best weights for the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

DAMPING = 0.01
"""Of the mean square of the features, added to each: keeps the equations solvable."""


@dataclass(eq=False)
class Statistics:
    """Sums over tokens: of x x^T, and of target x^T."""

    gram_FF: Tensor
    cross_OF: Tensor
    tokens: int = 0

    @classmethod
    def empty(cls, features: int, outputs: int, device: torch.device) -> Self:
        return cls(
            torch.zeros(features, features, device=device),
            torch.zeros(outputs, features, device=device),
        )

    def add(self, x_NF: Tensor, target_NO: Tensor | None = None) -> None:
        x_NF = x_NF.float()
        self.gram_FF.addmm_(x_NF.T, x_NF)
        if target_NO is not None:
            self.cross_OF.addmm_(target_NO.float().T, x_NF)
        self.tokens += len(x_NF)

    def error(self, weight_OF: Tensor, reference_OF: Tensor) -> float:
        """The squared error of one weight's outputs, relative to the reference's."""
        difference = (weight_OF - reference_OF).to(self.gram_FF)
        reference = reference_OF.to(self.gram_FF)
        total = ((reference @ self.gram_FF) * reference).sum().clamp(min=1e-30)
        return float(((difference @ self.gram_FF) * difference).sum() / total)


def solve(statistics: Statistics, damping: float = DAMPING) -> Tensor:
    """(outputs, features) the weights that come closest to the targets, drawn to 0 by damping."""
    return remove_units(statistics, 0, damping=damping).weight_OF


@dataclass(frozen=True, eq=False)
class Removal:
    """Which units go, and the weights of the projection without them."""

    removed: Tensor
    """(n,) units in the order of removal."""
    weight_OF: Tensor
    """With zeros for the features of removed units."""
    costs: Tensor
    """(n,) the squared error that each of them adds, given the best weights for the others; none if
    the order was given."""


def remove_units(
    statistics: Statistics,
    count: int,
    *,
    width: int = 1,
    damping: float = DAMPING,
    prior_OF: Tensor | None = None,
    order: Tensor | None = None,
) -> Removal:
    """Remove `count` units one after the other, each time the one whose loss costs least.

    The cost is what the best weights for the remaining units cannot make up for (the criterion of
    Optimal Brain Surgeon, for a group of features). Damping pulls the weights to `prior_OF`. With
    an `order` the first units of it are removed, and only the weights are computed.
    """
    gram = statistics.gram_FF.double()
    ridge = damping * gram.diagonal().mean().clamp(min=1e-12)
    gram.diagonal().add_(ridge)
    cross = statistics.cross_OF.double()
    if prior_OF is not None:
        cross = cross + ridge * prior_OF.double()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    weight = cross @ inverse
    removed: list[int] = []
    added: list[Tensor] = []
    for step in range(count):
        if order is not None:
            unit = int(order[step])
        else:
            costs = _costs(weight, inverse, width)
            costs[removed] = torch.inf
            unit = int(costs.argmin())
            added.append(costs[unit])
        _remove(weight, inverse, slice(unit * width, (unit + 1) * width))
        removed.append(unit)
    costs = torch.stack(added).float() if added else torch.zeros(0)
    return Removal(torch.tensor(removed, dtype=torch.long), weight.float(), costs)


def _costs(weight_OF: Tensor, inverse_FF: Tensor, width: int) -> Tensor:
    """(units,) trace of w (inverse of the unit's block)^-1 w^T."""
    if width == 1:
        return weight_OF.square().sum(dim=0) / inverse_FF.diagonal().clamp(min=1e-30)
    units = len(inverse_FF) // width
    blocks = inverse_FF.view(units, width, units, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    gone = (blocks.diagonal(dim1=1, dim2=2).sum(-1) == 0)[:, None, None]
    safe = blocks + gone * torch.eye(width, dtype=blocks.dtype, device=blocks.device)
    w = weight_OF.view(len(weight_OF), units, width).permute(1, 2, 0)
    return (w * torch.linalg.solve(safe, w)).sum(dim=(1, 2))


def _remove(weight_OF: Tensor, inverse_FF: Tensor, unit: slice) -> None:
    """Update weights and inverse in place, for the problem without this unit's features."""
    block, rows = inverse_FF[unit, unit], inverse_FF[unit].clone()
    if len(block) == 1:  # a rank-one update in place is several times as fast
        scaled = rows[0] / block[0, 0]
        weight_OF.addr_(weight_OF[:, unit][:, 0].clone(), scaled, alpha=-1)
        inverse_FF.addr_(rows[0], scaled, alpha=-1)
    else:
        scaled = torch.linalg.solve(block, rows)
        weight_OF.addmm_(weight_OF[:, unit].clone(), scaled, alpha=-1)
        inverse_FF.addmm_(rows.T, scaled, alpha=-1)
    weight_OF[:, unit] = 0
    inverse_FF[unit] = 0
    inverse_FF[:, unit] = 0
