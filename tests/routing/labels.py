"""A label table in which what is hard is known: questions of a few kinds, each with its chances."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np

from pliant.routing.outcomes import Outcomes

# How likely the small and the large model are right; all of one length, which tells nothing.
KINDS = {"total": (0.95, 0.97), "times": (0.1, 0.9), "prove": (0.05, 0.1), "spell": (0.7, 0.9)}
WORDINGS = ("{kind} {a} and {b}", "please {kind} these: {a}; {b}")


def outcomes(n: int, seed: int = 0, wordings: bool = False, models: int = 2) -> Outcomes:
    draw = random.Random(seed)
    kinds = [draw.choice(list(KINDS)) for _ in range(n)]
    which = [draw.randrange(2) if wordings else 0 for _ in range(n)]
    prompts = [
        WORDINGS[w].format(kind=kind, a=draw.randrange(10**6), b=draw.randrange(10**6))
        for kind, w in zip(kinds, which, strict=True)
    ]
    ends = np.array([KINDS[kind] for kind in kinds])
    steps = np.linspace(0, 1, models)
    chances = ends[:, :1] * (1 - steps) + ends[:, 1:] * steps
    right = np.random.default_rng(seed).random((n, models)) < chances
    return Outcomes(
        prompts=tuple(prompts),
        models=tuple(f"model-{j}" for j in range(models)),
        right=right.astype(float),
        cost=np.tile(np.linspace(0.0, 1.0, models), (n, 1)),
        groups=tuple(kinds),
        wordings=tuple(map(str, which)) if wordings else None,
    )


def specialists(n: int, seed: int) -> Outcomes:
    """Two models at one price, each right on half of the kinds of prompts."""
    labels = outcomes(n, seed)
    kinds = sorted(set(labels.groups))
    good = np.array([kinds.index(group) % 2 for group in labels.groups])
    chance = np.where(good[:, None] == np.arange(2), 0.9, 0.15)
    right = (np.random.default_rng(seed).random((n, 2)) < chance).astype(float)
    return replace(labels, right=right, cost=np.ones((n, 2)))
