"""Which threshold of a sequence is proved to keep a goal, and how many labels would prove more.

A risk goal holds where losses less gains (risk.py) are at most the limit, as shares of all
prompts. A quality goal, a share a of the strong model's quality, holds where

    right answers of the router >= a * right answers of the strongest model

or, among the prompts on which either is right, losses - a * gains <= 1 - a: one test of both
qualities on the same prompts. A bound of the strongest model's quality and a test of the losses
with what that leaves of the permitted risk need 2 to 4 points more calls (MMLU, 660 labels).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from pliant.routing.decision_rule import Chosen, Sweep
from pliant.routing.goals.goal import Goal
from pliant.routing.goals.risk import EXTRA, Counts, proved, rounded
from pliant.stats import Floats

# Of the strong model, a guess. On 40 label sets drawn from GSM8K it changes no threshold. Of models
# that complement each other, right on 35, 60 and 90 % (300 labels, 80 % confidence), the measured
# quality sent 79, 61 and 9 % of calls to the strong one, .4 sends 81, 52 and 9 %, and .7 88, 61, 9.
_USUAL = 0.4
CROSS_FITTED = 1.3
"""The variance of a loss out of fold less that of the scorer that is used, over the variance of as
many independent losses: 1.2 to 1.5 on 80 draws of 660 MMLU labels. Without this, 5.5 and 6 % of 200
draws broke promises of 5 % (benchmarks/promises.py)."""
_DIFFER = 0.3  # of prompts, that two models answer with different success: only a guess is needed


@dataclass(frozen=True, eq=False)
class Proof:
    """The tests of one goal on one split: only the choices differ from test to test."""

    goal: Goal
    swept: Sweep
    cross_fitted: bool = False

    def last(self, grid: Floats) -> float | None:
        """The last value of the grid before the first that is not proved; None if none is.

        -inf needs no proof where it sends every prompt to the strongest model. Where novel prompts
        go to another model it is the first that is tested.
        """
        swept, (limit, worth), delta = self.swept, self._limit, self._delta
        safest_is_sure = swept.rule.novel_to in (None, swept.rule.models - 1)
        values = np.unique(grid)  # ascending: from the most calls to the strongest to the fewest
        if not safest_is_sure:
            values = np.union1d(values, [-np.inf])
        elif (values >= 0).any() and self._is_easier_at_0():
            values = values[values >= 0]
        # Not the choices of -inf: what changes nothing here may change other prompts of its kind.
        passed, before = -math.inf if safest_is_sure else None, None
        for value in values:
            chosen = swept.choose(float(value))
            if before is None or (chosen != before).any():  # else it is the same test as the last
                if not proved(self.counts(chosen), limit, worth, delta):
                    break
                before = chosen
            passed = float(value)
        return passed

    def _is_easier_at_0(self) -> bool:
        """Whether the sequence had better start at 0, where the model that is likelier right
        answers: there models that complement each other lose the least, while on the few prompts
        of the first thresholds chance decides. By the predictions and a usual quality alone, so
        that any start is one that these labels have not chosen."""
        swept, limit = self.swept, self._limit[0]
        if self.goal.kind == "quality":
            limit *= _USUAL
        n, chosen = len(swept.outcomes), swept.choose(0.0)
        gain = swept.gain if swept.gain.ndim == 2 else np.stack([0 * swept.gain, swept.gain], 1)
        lost = float((gain[:, -1] - gain[np.arange(n), chosen]).sum())
        others = np.count_nonzero(chosen != gain.shape[1] - 1)
        return (n * limit - lost) / math.sqrt(_DIFFER * others + 4) > n * limit / 2

    def counts(self, chosen: Chosen) -> Counts:
        """The losses and gains of these choices. A question counts once, with the means of its
        wordings, because they are no independent evidence."""
        outcomes = self.swept.outcomes
        both = outcomes.strong, outcomes.routed(chosen)[0]
        strong, routed = (rounded(self._by_question(right)) for right in both)
        return Counts.of(strong, routed, either=self.goal.kind == "quality")

    def labels_for(self, value: float) -> float:
        """About how many prompts would prove this value in four of five cases, if losses and gains
        stay what they are here; inf if no number would."""
        from scipy.special import ndtri

        (limit, worth), n = self._limit, len(self.swept.outcomes)
        counts = self.counts(self.swept.choose(value))
        spread = math.sqrt(counts.variance(limit) / n)
        # Half a standard error less: where this is asked the proof was expensive, so losses before
        # the threshold were high by chance, and those up to it are low by comparison.
        margin = counts.margin(limit, worth) / n - spread / math.sqrt(n) / 2
        if margin <= 0:
            return math.inf
        z = -float(ndtri(self._delta))
        errors = (z - float(ndtri(0.2))) * spread
        # n * margin = errors * sqrt(n) + sqrt(EXTRA) * z, which risk.py adds for few losses.
        added = 4 * margin * math.sqrt(EXTRA) * max(z, 0)
        return ((errors + math.sqrt(errors**2 + added)) / (2 * margin)) ** 2

    @property
    def _limit(self) -> tuple[float, float]:
        """What the share of losses has to be below, less this much times the share of gains."""
        amount = self.goal.amount
        return (amount, 1.0) if self.goal.kind == "risk" else (1 - amount, amount)

    @property
    def _delta(self) -> float:
        """The risk with which a proof may be wrong; of cross-fitted predictions so much less that a
        normal quantile is larger by the error that they add."""
        from scipy.special import ndtr, ndtri

        assert self.goal.confidence is not None
        delta = round(1 - self.goal.confidence, 12)
        if not self.cross_fitted or delta >= 0.5:
            return delta
        return float(ndtr(ndtri(delta) * math.sqrt(CROSS_FITTED)))

    def _by_question(self, values: Floats) -> Floats:
        at = self._question
        return values if at is None else np.asarray(np.bincount(at, values) / np.bincount(at))

    @cached_property
    def _question(self) -> NDArray[np.int64] | None:
        """(n,) which question each prompt words, if several word one."""
        questions = self.swept.outcomes.questions
        return None if questions is None else np.unique(questions, return_inverse=True)[1]
