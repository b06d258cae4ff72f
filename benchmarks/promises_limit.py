"""The fewest calls with which any procedure can keep a promise of a confidence with n labels.

A procedure that breaks its promise on at most a share delta of label sets may select a threshold
that breaks it that rarely, in each population. Be F(c) how often it sends at most c of the calls
to the strongest model. In the population that is nearest to the true one and in which the threshold
at c just breaks the goal, F(c) is at most delta, so in the true population F(c) is at most the
power of the most powerful test of level delta between the two (Neyman and Pearson); and the mean
of the calls is at least the integral of 1 - power. "Nearest" is the exponential tilt of

    amount * strongest right - router right   (quality)      strongest - router - amount   (risk)

under which that test rejects a low sum of n such values, whose distribution is computed exactly.
The router's predictions are known here, and stay what they are, as does the range of thresholds:
the quality has to fall with the calls that are saved, which it does where the strongest model is
ahead everywhere. For models that complement each other it is no strict bound.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from scipy.optimize import brentq

from pliant.routing.decision_rule import Sweep
from pliant.routing.goals.goal import Goal
from pliant.stats import Floats

VALUES = 50  # thresholds at which the power is computed
ANSWERS = ((0, 0), (1, 0), (0, 1), (1, 1))  # strongest and router, right or wrong


@dataclass(frozen=True, eq=False)
class Curve:
    """What each of some thresholds does on a population, from the fewest calls to the most."""

    calls: Floats
    costs: Floats
    """As a share of the strongest model's."""
    answers: Floats
    """(values, 4) how often the strongest and the routed answer are right, as in ANSWERS."""

    @classmethod
    def of(cls, known: Sweep) -> Curve:
        steps, outcomes = known.steps, known.outcomes
        at = np.unique(np.linspace(0, len(steps.values) - 1, VALUES).round().astype(int))
        answers = []
        for value in steps.values[at]:
            routed = outcomes.routed(known.choose(float(value)))[0]
            pairs = (2 * routed + outcomes.strong).astype(int)
            answers.append(np.bincount(pairs, minlength=len(ANSWERS)) / len(outcomes))
        costs = steps.costs[at] / outcomes.cost[:, -1].mean()
        return cls(steps.shares[at], costs, np.array(answers))

    def powers(self, goal: Goal, n: int) -> Floats:
        """(values,) how often the best test of the goal's confidence proves each threshold or one
        with fewer calls."""
        assert goal.confidence is not None
        amount, delta = Fraction(goal.amount).limit_denominator(1000), 1 - goal.confidence
        quality = goal.kind == "quality"
        losses = [
            amount * strong - routed if quality else strong - routed - amount
            for strong, routed in ANSWERS
        ]
        steps = np.array([int(loss * amount.denominator) for loss in losses])
        powers = np.array([power(chances, steps, n, delta) for chances in self.answers])
        powers[-1] = 1.0  # everything to the strongest model needs no proof
        return np.maximum.accumulate(powers)

    def least(self, goal: Goal, n: int) -> dict[str, float]:
        """The lower bounds of the mean calls and cost, and where the power is a half."""
        powers = self.powers(goal, n)
        return {
            "calls": float(self.calls[0] + np.trapezoid(1 - powers, self.calls)),
            "cost": float(self.costs[0] + np.trapezoid(1 - powers, self.costs)),
            "calls at power 1/2": float(self.calls[np.argmax(powers >= 0.5)]),
        }


def power(chances: Floats, losses: Floats, n: int, delta: float) -> float:
    """Of the most powerful test of level delta whose null is the tilt to a mean loss of 0."""
    happen = chances > 0
    chances, losses = chances[happen], losses[happen]
    if chances @ losses > -1e-12:  # the goal is broken, or just met but for rounding
        return 0.0
    if losses.max() <= 0:
        return 1.0

    def tilted(angle: float) -> Floats:
        weights = chances * np.exp(angle * (losses - losses.max()))
        return np.asarray(weights / weights.sum())

    angle = brentq(lambda a: float(tilted(a) @ losses), 0.0, 60.0)
    null = tilted(angle)
    true_sums, null_sums = sums([chances, null], losses, n)
    below = np.cumsum(null_sums)
    last = int(np.searchsorted(below, delta, side="right"))  # with less than all of its chance
    part = (delta - (below[last - 1] if last else 0.0)) / null_sums[last]
    return float(min(1.0, true_sums[:last].sum() + part * true_sums[last]))


def sums(chances: list[Floats], losses: Floats, n: int) -> Iterator[Floats]:
    """The distributions of the sum of n losses, ascending, over a range that holds nearly all."""
    spread = max(math.sqrt(float(p @ losses**2) * n) for p in chances)
    shift = max(abs(float(p @ losses)) * n for p in chances)
    size = 1 << math.ceil(math.log2(2 * shift + 24 * spread + 2 * np.ptp(losses) + 2))
    for p in chances:
        single = np.bincount(losses % size, weights=p, minlength=size)
        waves = np.fft.rfft(single)
        matter = n * np.log(np.abs(waves) + 1e-300) > -45  # the n-th power of the others is 0
        waves[matter] **= n
        waves[~matter] = 0
        circular = np.fft.irfft(waves, size)
        yield np.maximum(np.roll(circular, size // 2), 0.0)
