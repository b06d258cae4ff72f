"""The seed's `compute_cem_interpolation`: one coefficient for each expert, by a global search.

    result = compute_cem_interpolation({"math": z_math, "code": z_code}, score)
    result.alphas, result.z

The seed prints no signature. Left out: anything about models. `FewShot` evaluates all candidates
in one batch; here `score` is any function of z, called for one candidate after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pliant.errors import InvalidInput
from pliant.experts.adapting.cem import CEMConfig, Scores, search
from pliant.experts.adapting.strategy import name_of

Vectors = Tensor | Mapping[str, Tensor]
"""An expert's z: of one matrix, or of several by their names."""


@dataclass(frozen=True, eq=False)
class Interpolation:
    """The best mixture of experts, z = 1 + sum of alpha_k (z_k - 1)."""

    alphas: dict[str, float]
    z: Vectors
    score: float
    """Of this mixture."""
    base_score: float
    """With every alpha 0, where z is 1."""

    def as_dict(self) -> dict[str, Any]:
        return {"alphas": self.alphas, "score": self.score, "base_score": self.base_score}

    def __str__(self) -> str:
        return f"{name_of(self.alphas)} scores {self.score:.4f}, and the base {self.base_score:.4f}"


def compute_cem_interpolation(
    z_vectors: Mapping[str, Vectors],
    score: Callable[[Any], float],
    *,
    population: int = 32,
    iterations: int = 12,
    elite_share: float = 0.2,
    std: float = 0.5,
    l1: float = 0.0,
    seed: int = 0,
) -> Interpolation:
    """Search the mixture of the experts' z for which `score(z)` is highest.

    `score` gets z in the form in which the experts come: a tensor, or a mapping of tensors. Alphas
    are not clamped and need not sum to 1; the base and each expert alone are among the candidates.
    """
    experts = {name: _by_name(z) for name, z in z_vectors.items()}
    _check_fit(experts)
    names = list(experts)
    bare = isinstance(next(iter(z_vectors.values())), Tensor)

    def mixed(alphas: Any) -> Vectors:
        z: dict[str, Tensor] = {}
        for key, like in experts[names[0]].items():
            z[key] = torch.ones_like(like)
            for alpha, name in zip(alphas, names, strict=True):
                z[key] = z[key] + float(alpha) * (experts[name][key] - 1)
        return z[""] if bare else z

    def scores(candidates: Any) -> Scores:
        with torch.no_grad():
            return Scores(np.array([float(score(mixed(alphas))) for alphas in candidates]))

    config = CEMConfig(
        population=population,
        iterations=iterations,
        elite_share=elite_share,
        std=std,
        l1=l1,
        seed=seed,
    )
    average = [1 / len(names)] * len(names)
    result = search(scores, len(names), config, average, np.eye(len(names)).tolist())
    with torch.no_grad():
        z = mixed(result.best)
    alphas = dict(zip(names, result.best, strict=True))
    return Interpolation(alphas, z, result.value, result.start_value)


def _by_name(z: Vectors) -> dict[str, Tensor]:
    return {"": z} if isinstance(z, Tensor) else dict(z.items())


def _check_fit(experts: Mapping[str, Mapping[str, Tensor]]) -> None:
    if not experts:
        raise InvalidInput("there are no z-vectors: name at least one expert")
    first, *others = experts
    shapes = {name: {key: tuple(t.shape) for key, t in z.items()} for name, z in experts.items()}
    for name in others:
        if shapes[name] != shapes[first]:
            raise InvalidInput(
                f"the z-vectors of {name!r} have the shapes {shapes[name]}, and those of {first!r} "
                f"{shapes[first]}: experts of different bases cannot be mixed"
            )
