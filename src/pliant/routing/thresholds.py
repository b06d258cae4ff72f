"""From a goal in words to a threshold on the predicted gain, and what it promises.

    # with the predictions and labels of the calibration split
    chosen = threshold("at most 2 % worse, with 95 % confidence", gain, outcomes)
    chosen.strong(gain_of_other_prompts)     # who goes to the strong model
    print(chosen)                            # what was chosen, and what that promises

A prompt goes to the strong model if its predicted gain lies above the threshold. A budget and a
quality hold on the calibration split, and on others as far as those are like it. A goal with a
confidence is proved: of all calibration splits that could have been drawn from one population, at
least that share lead to a threshold that keeps the goal on the population.

How it is proved (learn then test, Angelopoulos and others): thresholds of a grid that was fixed
before the labels were seen are tested one after the other, from the safest (all to the strong
model) on, each at level 1 - confidence, and the last before the first failure is taken. A wrong
one can only be taken if the first wrong one passes its test. The tests are those of risk.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pliant.errors import InvalidInput
from pliant.routing.goals import Goal
from pliant.routing.outcomes import Outcomes
from pliant.routing.risk import proves_below

__all__ = ["GRID", "Goal", "Threshold", "by_budget", "by_quality", "by_risk", "threshold"]

Floats = NDArray[np.float64]
GRID = np.linspace(-1, 1, 2001)
"""The thresholds that are tested where no others are named: every gain there can be, by .001."""


@dataclass(frozen=True)
class Threshold:
    """A predicted gain above `value` goes to the strong model; and what that did on the split."""

    value: float
    """-inf sends every prompt to the strong model, inf none."""
    goal: Goal
    n: int
    """How many prompts the calibration split had."""
    share: float
    """Of these, how many went to the strong model."""
    quality: float
    weak_quality: float
    strong_quality: float
    cost: float
    """The mean of a prompt, in `unit`."""
    unit: str
    models: tuple[str, str]

    def strong(self, gain: ArrayLike) -> NDArray[np.bool_]:
        """Which prompts go to the strong model."""
        return np.asarray(gain, dtype=np.float64) > self.value

    @property
    def promise(self) -> str:
        """What holds for other prompts."""
        if self.goal.confidence is None:
            return "This was so on the calibration split; it is no promise for other prompts."
        return (
            f"Of calibration splits drawn like this one, {_percent(self.goal.confidence)} or more "
            "lead to a threshold that keeps this for all prompts of the same kind."
        )

    def __str__(self) -> str:
        weak, strong = self.models
        rule = f"a predicted gain above {self.value:.4g} goes to {strong}"
        rule = f"everything goes to {strong}" if self.value == -math.inf else rule
        rule = f"nothing goes to {strong}" if self.value == math.inf else rule
        return (
            f"{self.goal}: {rule}. On {self.n:,} calibration prompts that was "
            f"{_percent(self.share)} of calls, at a quality of {self.quality:.3f} ({weak} alone "
            f"{self.weak_quality:.3f}, {strong} alone {self.strong_quality:.3f}) and a mean cost "
            f"of {self.cost:.4g} {self.unit} a prompt. {self.promise}"
        )

    def to_json(self) -> dict[str, Any]:
        """For a router's file; JSON knows no infinity, so the value is text where it is one."""
        value = self.value if math.isfinite(self.value) else str(self.value)
        return {**asdict(self), "value": value, "goal": str(self.goal), "models": list(self.models)}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Threshold:
        try:
            read = {**content, "value": float(content["value"]), "models": tuple(content["models"])}
            return cls(**{**read, "goal": Goal.parse(content["goal"])})
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, InvalidInput):
                raise
            raise InvalidInput(f"not a threshold as Pliant writes it ({error})") from error


def threshold(
    goal: Goal | str, gain: ArrayLike, outcomes: Outcomes, grid: ArrayLike | None = None
) -> Threshold:
    """The threshold that meets a goal on the calibration split, and proves it where that is asked.

    `grid`, for goals with a confidence, must not come from these predictions or labels: those of
    the training split will do, and GRID for gains that are differences of probabilities.
    """
    goal = Goal.parse(goal) if isinstance(goal, str) else goal
    split = _Split.of(gain, outcomes)
    if goal.confidence is not None:
        return _proved(goal, split, GRID if grid is None else np.asarray(grid, dtype=np.float64))
    if goal.kind == "share":
        return split.chosen(goal, lambda i: split.shares[i] <= goal.amount + 1e-12, dearest=True)
    if goal.kind == "cost":
        _refuse_impossible_budget(goal, split)
        return split.chosen(goal, lambda i: split.costs[i] <= goal.amount * (1 + 1e-9), True)
    wanted = goal.amount * outcomes.strong.mean()
    return split.chosen(goal, lambda i: split.qualities[i] >= wanted - 1e-12, dearest=False)


def by_budget(
    gain: ArrayLike, outcomes: Outcomes, *, share: float | None = None, cost: float | None = None
) -> Threshold:
    """As many strong calls as fit into a share of calls, or into a mean cost a prompt.

    Where predictions are equal all of them go or none: the budget is kept, if not used up.
    """
    if (share is None) == (cost is None):
        raise InvalidInput("by_budget: either a share of calls or a mean cost a prompt is due")
    if share is not None:
        return threshold(Goal("share", share), gain, outcomes)
    assert cost is not None
    return threshold(Goal("cost", cost, None, outcomes.unit), gain, outcomes)


def by_quality(
    gain: ArrayLike,
    outcomes: Outcomes,
    quality: float = 0.95,
    confidence: float | None = None,
    grid: ArrayLike | None = None,
) -> Threshold:
    """The fewest strong calls with this share of the strong model's quality."""
    return threshold(Goal("quality", quality, confidence), gain, outcomes, grid)


def by_risk(
    gain: ArrayLike,
    outcomes: Outcomes,
    epsilon: float = 0.02,
    delta: float = 0.05,
    grid: ArrayLike | None = None,
) -> Threshold:
    """The fewest strong calls with a quality proved to be at most epsilon under the strong model's.

    Epsilon is a difference of qualities: .02 allows .84 where the strong model has .86.
    """
    return threshold(Goal("risk", epsilon, 1 - delta), gain, outcomes, grid)


# --- how it is chosen ----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Split:
    """What each threshold between two different predictions would do; few strong calls first."""

    gain: Floats
    outcomes: Outcomes
    values: Floats
    shares: Floats
    qualities: Floats
    costs: Floats

    @classmethod
    def of(cls, gain: ArrayLike, outcomes: Outcomes) -> _Split:
        predicted = np.asarray(gain, dtype=np.float64)
        if predicted.shape != (len(outcomes),) or not np.isfinite(predicted).all():
            raise InvalidInput(
                f"gain: one finite number for each of {len(outcomes)} prompts is due, "
                f"not {predicted.shape}"
            )
        distinct, block = np.unique(-predicted, return_inverse=True)
        extra = outcomes.cost[:, -1] - outcomes.cost[:, 0]
        between = -(distinct[:-1] + distinct[1:]) / 2
        values = np.concatenate([[np.inf], between, [-np.inf]])
        means = [
            np.concatenate([[0], np.cumsum(np.bincount(block, of))]) / len(outcomes)
            for of in (np.ones(len(outcomes)), outcomes.gain, extra)
        ]
        return cls(
            predicted,
            outcomes,
            values,
            means[0],
            outcomes.weak.mean() + means[1],
            outcomes.cost[:, 0].mean() + means[2],
        )

    def chosen(self, goal: Goal, holds: Callable[[int], bool], dearest: bool) -> Threshold:
        """Of those for which the goal holds, the one with the most strong calls, or the fewest."""
        order = range(len(self.values))
        found = next((i for i in (reversed(order) if dearest else order) if holds(i)), None)
        assert found is not None  # no strong call is in every budget, and all reach every quality
        return self.at(goal, float(self.values[found]))

    def at(self, goal: Goal, value: float) -> Threshold:
        """The threshold, and what it does on this split."""
        strong, outcomes = self.gain > value, self.outcomes
        right = np.where(strong, outcomes.strong, outcomes.weak)
        cost = np.where(strong, outcomes.cost[:, -1], outcomes.cost[:, 0])
        return Threshold(
            value,
            goal,
            len(outcomes),
            float(strong.mean()),
            float(right.mean()),
            float(outcomes.weak.mean()),
            float(outcomes.strong.mean()),
            float(cost.mean()),
            outcomes.unit,
            (outcomes.models[0], outcomes.models[-1]),
        )


def _proved(goal: Goal, split: _Split, grid: Floats) -> Threshold:
    """The last threshold of the grid before the first that is not proved; -inf needs no proof."""
    if grid.ndim != 1 or not len(grid) or np.isnan(grid).any():
        raise InvalidInput("grid: a row of numbers is due")
    assert goal.confidence is not None
    delta = round(1 - goal.confidence, 12)
    outcomes, taken, before = split.outcomes, -math.inf, -1
    for value in np.unique(grid):  # ascending: from the most strong calls to the fewest
        weak = split.gain <= value
        if int(weak.sum()) != before:  # else it is the same test as the last
            before = int(weak.sum())
            routed = np.where(weak, outcomes.weak, outcomes.strong)
            if not _keeps(goal, routed, outcomes.strong, delta):
                break
        taken = float(value)
    return split.at(goal, taken)


def _keeps(goal: Goal, routed: Floats, strong: Floats, delta: float) -> bool:
    if goal.kind == "risk":
        return proves_below(strong - routed, goal.amount, delta)
    return proves_below(goal.amount * strong - routed, 0.0, delta)


def _refuse_impossible_budget(goal: Goal, split: _Split) -> None:
    if goal.unit != split.outcomes.unit:
        raise InvalidInput(
            f"{goal}: the costs of these labels are in {split.outcomes.unit}, not {goal.unit}"
        )
    if split.costs.min() > goal.amount * (1 + 1e-9):
        raise InvalidInput(
            f"{goal}: no threshold costs less than {split.costs.min():.4g} {goal.unit} a prompt"
        )


def _percent(share: float) -> str:
    return f"{100 * share:.4g} %"
