"""Which threshold of a sequence is proved to keep a goal, and how many labels would prove more.

A quality goal, a share a of the strong model's quality, is kept where the mean of strong - routed
is at most (1 - a) times the strong model's mean quality. That quality is bounded from below with a
tenth of the permitted risk, and the losses are tested against the limit that follows with the rest.
The strong model's quality depends on no scorer, so all labels of it may be used for the bound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from pliant.errors import InvalidInput
from pliant.routing.decision_rule import Chosen, Sweep
from pliant.routing.goals.goal import Goal
from pliant.routing.goals.risk import highest_sums, lowest_share, passes, whole
from pliant.stats import Floats

# Of the permitted risk, for the strong model's quality: 3 % and 10 % send as many calls, 20 % more.
_FOR_STRONG = 0.1
# Of the strong model, a guess. On 40 label sets drawn from GSM8K it changes no threshold. Of models
# that complement each other, right on 35, 60 and 90 % (300 labels, 80 % confidence), the measured
# quality sent 79, 61 and 9 % of calls to the strong one, .4 sends 81, 52 and 9 %, and .7 88, 61, 9.
_USUAL = 0.4
_DIFFER = 0.3  # of prompts, that two models answer with different success: only a guess is needed


@dataclass(frozen=True, eq=False)
class Proof:
    """The tests of one goal on one split: only the choices differ from test to test."""

    goal: Goal
    swept: Sweep
    strong: Floats
    """How often the strongest model is right, one entry a question; of more labels than the split
    has, where there are more."""

    @classmethod
    def of(cls, goal: Goal, swept: Sweep, strong: ArrayLike | None = None) -> Proof:
        right = _by_question(swept.outcomes.strong, swept.outcomes.questions)
        if strong is not None:
            right = np.asarray(strong, dtype=np.float64)
            if right.ndim != 1 or not len(right) or not ((right >= 0) & (right <= 1)).all():
                raise InvalidInput("strong_labels must be a row of numbers in [0, 1]")
        return cls(goal, swept, right)

    def last(self, grid: Floats) -> float | None:
        """The last value of the grid before the first that is not proved; None if none is.

        -inf needs no proof where it sends every prompt to the strongest model. Where novel prompts
        go to another model it is the first that is tested.
        """
        swept, (limit, delta) = self.swept, self._limit()
        safest_is_sure = swept.rule.novel_to in (None, swept.rule.models - 1)
        values = np.unique(grid)  # ascending: from the most calls to the strongest to the fewest
        if not safest_is_sure:
            values = np.union1d(values, [-np.inf])
        elif (values >= 0).any() and self._is_easier_at_0():
            values = values[values >= 0]
        # Not the choices of -inf: what changes nothing here may change other prompts of its kind.
        passed, before = -math.inf if safest_is_sure else None, None
        highest = None
        for value in values:
            chosen = swept.choose(float(value))
            if before is None or (chosen != before).any():  # else it is the same test as the last
                losses = self.losses(chosen)
                highest = highest_sums(len(losses), limit, delta) if highest is None else highest
                if not passes(whole(losses), highest):
                    break
                before = chosen
            passed = float(value)
        return passed

    def _is_easier_at_0(self) -> bool:
        """Whether the sequence had better start at 0, where the model that is likelier right
        answers: there models that complement each other lose the least, while on the few prompts
        of the first thresholds chance decides. By the predictions and a usual quality alone, so
        that any start is one that these labels have not chosen."""
        swept, goal = self.swept, self.goal
        limit = goal.amount if goal.kind == "risk" else (1 - goal.amount) * _USUAL
        n, chosen = len(swept.outcomes), swept.choose(0.0)
        gain = swept.gain if swept.gain.ndim == 2 else np.stack([0 * swept.gain, swept.gain], 1)
        lost = float((gain[:, -1] - gain[np.arange(n), chosen]).sum())
        others = np.count_nonzero(chosen != gain.shape[1] - 1)
        return (n * limit - lost) / math.sqrt(_DIFFER * others + 4) > n * limit / 2

    def losses(self, chosen: Chosen) -> Floats:
        """The strongest model's quality less the router's: the mean of each question, because its
        wordings are no independent evidence."""
        outcomes = self.swept.outcomes
        lost = outcomes.strong - outcomes.routed(chosen)[0]
        return _by_question(lost, outcomes.questions)

    def labels_for(self, value: float) -> float:
        """About how many prompts would prove this value in four of five cases, if the losses
        stay what they are here; inf if no number would."""
        from scipy.special import ndtri

        losses, delta = whole(self.losses(self.swept.choose(value))), self._limit()[1]
        quality = float(self.strong.mean())
        quality_goal = self.goal.kind == "quality"
        limit = (1 - self.goal.amount) * quality if quality_goal else self.goal.amount
        spread = math.sqrt(np.count_nonzero(losses) / len(losses))
        # Half a standard error less: where this is asked the proof was expensive, so losses before
        # the threshold were high by chance, and those up to it are low by comparison.
        margin = limit - float(losses.mean()) - spread / math.sqrt(len(losses)) / 2
        z = -float(ndtri(delta))
        if margin <= 0:
            return math.inf
        errors = (z - float(ndtri(0.2))) * spread
        if quality_goal:
            z_strong = -float(ndtri(delta * _FOR_STRONG / (1 - _FOR_STRONG)))
            errors += (1 - self.goal.amount) * z_strong * math.sqrt(quality * (1 - quality))
        # n * margin = errors * sqrt(n) + 2 z, in which 2 z is what risk.py adds for few losses.
        return ((errors + math.sqrt(errors**2 + 8 * margin * max(z, 0))) / (2 * margin)) ** 2

    def _limit(self) -> tuple[float, float]:
        """What the mean loss has to be below, and the risk with which that may be wrong."""
        assert self.goal.confidence is not None
        delta = round(1 - self.goal.confidence, 12)
        if self.goal.kind == "risk":
            return self.goal.amount, delta
        lowest = lowest_share(self.strong, delta * _FOR_STRONG)
        return (1 - self.goal.amount) * lowest, delta * (1 - _FOR_STRONG)


def _by_question(values: Floats, questions: tuple[str, ...] | None) -> Floats:
    if questions is None:
        return values
    at = np.unique(questions, return_inverse=True)[1]
    return np.asarray(np.bincount(at, values) / np.bincount(at))
