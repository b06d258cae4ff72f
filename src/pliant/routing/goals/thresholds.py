"""From a goal in words to a threshold on the predicted gain, and what it promises.

    # with the predictions and labels of the calibration split
    chosen = threshold("at most 2 % worse, with 95 % confidence", gain, outcomes)
    chosen.models_for(gain_of_other_prompts) # who goes to which model
    print(chosen)                            # what was chosen, and what that promises

Of two models the strong one answers if the predicted gain lies above the threshold. Of many (the
predictions are (n, m) then), the one with the highest gain - threshold * price does. A budget and a
quality hold on the calibration split, and on others as far as those are like it. A goal with a
confidence is proved: of all calibration splits that could have been drawn from one population, at
least that share lead to a threshold that keeps the goal on the population.

How it is proved (learn then test, Angelopoulos and others): thresholds of a grid that was fixed
before the labels were seen are tested one after the other, from the safest (all to the strong
model) on, each at level 1 - confidence, and the last before the first failure is taken. A wrong
one can only be taken if the first wrong one passes its test. The tests are those of risk.py. Where
several prompts word one question, it is questions that are drawn, and each counts once.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pliant.errors import InvalidInput
from pliant.routing.goals.paths import Path, path
from pliant.routing.goals.risk import proves_below
from pliant.routing.goals.words import Goal
from pliant.routing.outcomes import Outcomes
from pliant.routing.prices import Chosen, most_worth

__all__ = ["GRID", "Goal", "Threshold", "by_budget", "by_quality", "by_risk", "threshold"]

Floats = NDArray[np.float64]
GRID = np.linspace(-1, 1, 2001)
"""The gains that are tested where no others are named: all there can be, by .001."""


@dataclass(frozen=True)
class Threshold:
    """What sends a prompt to which model, and what that did on the split it was chosen on."""

    value: float
    """-inf sends every prompt to the strongest model, inf to the cheapest."""
    goal: Goal
    n: int
    """How many prompts the calibration split had."""
    shares: tuple[float, ...]
    """Of these, how many went to each model."""
    quality: float
    weak_quality: float
    strong_quality: float
    cost: float
    """The mean of a prompt, in `unit`."""
    unit: str
    models: tuple[str, ...]
    on: Literal["gain", "worth"] = "gain"
    """gain: the last of two models answers where gain > value. worth: the model with the highest
    gain - value * price answers."""
    prices: tuple[float, ...] | None = None
    """What each model's answer is taken to cost, for `worth`."""

    @property
    def share(self) -> float:
        """Of calls to the strongest model."""
        return self.shares[-1]

    def models_for(self, gain: ArrayLike) -> Chosen:
        """The index of the model that each prompt goes to."""
        if self.on == "gain":
            return self.strong(gain).astype(np.int64)
        assert self.prices is not None
        return most_worth(gain, self.prices, self.value)

    def strong(self, gain: ArrayLike) -> NDArray[np.bool_]:
        """Which prompts go to the strongest model."""
        if self.on == "gain":
            return np.asarray(gain, dtype=np.float64) > self.value
        return self.models_for(gain) == len(self.models) - 1

    @property
    def promise(self) -> str:
        """What holds for other prompts."""
        if self.goal.confidence is None:
            return "This was so on the calibration split; it is no promise for other prompts."
        return (
            f"Of calibration splits drawn like this one, {_percent(self.goal.confidence)} or more "
            "lead to a threshold that keeps this for all prompts of the same kind."
        )

    @property
    def rule(self) -> str:
        """Who answers."""
        weak, strong = self.models[0], self.models[-1]
        if math.isinf(self.value):
            return f"everything goes to {strong if self.value < 0 else weak}"
        if self.on == "gain":
            return f"a predicted gain above {self.value:.4g} goes to {strong}, the rest to {weak}"
        return f"the highest gain less {self.value:.4g} for each of its {self.unit} answers"

    def __str__(self) -> str:
        weak, strong = self.models[0], self.models[-1]
        calls = ", ".join(
            f"{_percent(share)} of calls to {name}"
            for name, share in reversed(list(zip(self.models, self.shares, strict=True)))
        )
        return (
            f"{self.goal}: {self.rule}. On {self.n:,} calibration prompts that was {calls}, at a "
            f"quality of {self.quality:.3f} ({weak} alone {self.weak_quality:.3f}, {strong} alone "
            f"{self.strong_quality:.3f}) and a mean cost of {self.cost:.4g} {self.unit} a prompt. "
            f"{self.promise}"
        )

    def to_json(self) -> dict[str, Any]:
        """For a file; JSON knows no infinity, so the value is text where it is one."""
        value = self.value if math.isfinite(self.value) else str(self.value)
        return {**asdict(self), "value": value, "goal": str(self.goal)}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Threshold:
        try:
            read = {**content, "value": float(content["value"])}
            read |= {name: tuple(content[name]) for name in ("models", "shares")}
            if read.get("prices") is not None:
                read["prices"] = tuple(read["prices"])
            return cls(**{**read, "goal": Goal.parse(content["goal"])})
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, InvalidInput):
                raise
            raise InvalidInput(f"not a threshold as Pliant writes it ({error})") from error


def threshold(
    goal: Goal | str,
    gain: ArrayLike,
    outcomes: Outcomes,
    grid: ArrayLike | None = None,
    prices: ArrayLike | None = None,
) -> Threshold:
    """The threshold that meets a goal on the calibration split, and proves it where that is asked.

    `gain` is (n,) for two models or (n, m), gains over the first one; `prices` what each model's
    answer is taken to cost, its mean in these outcomes where they are left out. `grid`, for goals
    with a confidence, must not come from these predictions or labels: those of the training split
    will do, and GRID (over the range of the prices) for gains that are differences of
    probabilities.
    """
    goal = Goal.parse(goal) if isinstance(goal, str) else goal
    along = path(gain, outcomes, prices)
    if goal.confidence is not None:
        tried = GRID * along.span if grid is None else np.asarray(grid, dtype=np.float64)
        return _proved(goal, along, tried)
    steps = along.steps
    if goal.kind == "quality":
        enough = steps.qualities >= goal.amount * outcomes.strong.mean() - 1e-12
        return _at(goal, along, float(steps.values[np.flatnonzero(enough)[0]]))
    if goal.kind == "cost":
        _refuse_impossible_budget(goal, along)
        within = steps.costs <= goal.amount * (1 + 1e-9)
    else:
        within = steps.shares <= goal.amount + 1e-12
    return _at(goal, along, float(steps.values[np.flatnonzero(within)[-1]]))


def by_budget(
    gain: ArrayLike,
    outcomes: Outcomes,
    *,
    share: float | None = None,
    cost: float | None = None,
    prices: ArrayLike | None = None,
) -> Threshold:
    """As many strong calls as fit into a share of calls, or into a mean cost a prompt.

    Where predictions are equal all of them go or none: the budget is kept, if not used up.
    """
    if (share is None) == (cost is None):
        raise InvalidInput("by_budget: either a share of calls or a mean cost a prompt is due")
    if share is not None:
        return threshold(Goal("share", share), gain, outcomes, None, prices)
    assert cost is not None
    return threshold(Goal("cost", cost, None, outcomes.unit), gain, outcomes, None, prices)


def by_quality(
    gain: ArrayLike,
    outcomes: Outcomes,
    quality: float = 0.95,
    confidence: float | None = None,
    grid: ArrayLike | None = None,
    prices: ArrayLike | None = None,
) -> Threshold:
    """The fewest strong calls with this share of the strongest model's quality."""
    return threshold(Goal("quality", quality, confidence), gain, outcomes, grid, prices)


def by_risk(
    gain: ArrayLike,
    outcomes: Outcomes,
    epsilon: float = 0.02,
    delta: float = 0.05,
    grid: ArrayLike | None = None,
    prices: ArrayLike | None = None,
) -> Threshold:
    """The fewest strong calls with a quality proved to be at most epsilon under the strongest's.

    Epsilon is a difference of qualities: .02 allows .84 where the strongest model has .86.
    """
    return threshold(Goal("risk", epsilon, 1 - delta), gain, outcomes, grid, prices)


# --- how it is chosen ----------------------------------------------------------------------------


def _at(goal: Goal, along: Path, value: float) -> Threshold:
    """The threshold, and what it does on this split."""
    outcomes, chosen = along.outcomes, along.chosen(value)
    rows = np.arange(len(outcomes))
    return Threshold(
        value,
        goal,
        len(outcomes),
        tuple((np.bincount(chosen, minlength=len(outcomes.models)) / len(outcomes)).tolist()),
        float(outcomes.right[rows, chosen].mean()),
        float(outcomes.weak.mean()),
        float(outcomes.strong.mean()),
        float(outcomes.cost[rows, chosen].mean()),
        outcomes.unit,
        outcomes.models,
        along.on,
        along.prices,
    )


def _proved(goal: Goal, along: Path, grid: Floats) -> Threshold:
    """The last threshold of the grid before the first that is not proved; -inf needs no proof."""
    if grid.ndim != 1 or not len(grid) or np.isnan(grid).any():
        raise InvalidInput("grid: a row of numbers is due")
    assert goal.confidence is not None
    delta = round(1 - goal.confidence, 12)
    outcomes, rows = along.outcomes, np.arange(len(along.outcomes))
    # Not that of -inf: what sends no prompt of this split elsewhere may send others of its kind.
    taken, before = -math.inf, None
    for value in np.unique(grid):  # ascending: from the most strong calls to the fewest
        chosen = along.chosen(float(value))
        if before is None or (chosen != before).any():  # else it is the same test as the last
            if not _keeps(goal, outcomes.right[rows, chosen], outcomes, delta):
                break
            before = chosen
        taken = float(value)
    return _at(goal, along, taken)


def _keeps(goal: Goal, routed: Floats, outcomes: Outcomes, delta: float) -> bool:
    if goal.kind == "risk":
        return proves_below(_by_question(outcomes.strong - routed, outcomes), goal.amount, delta)
    losses = goal.amount * outcomes.strong - routed
    return proves_below(_by_question(losses, outcomes), 0.0, delta)


def _by_question(losses: Floats, outcomes: Outcomes) -> Floats:
    """One loss a question, its mean: several wordings of one are no independent evidence."""
    if outcomes.questions is None:
        return losses
    at = np.unique(outcomes.questions, return_inverse=True)[1]
    mean: Floats = np.bincount(at, losses) / np.bincount(at)
    return mean


def _refuse_impossible_budget(goal: Goal, along: Path) -> None:
    unit = along.outcomes.unit
    if goal.unit != unit:
        raise InvalidInput(f"{goal}: the costs of these labels are in {unit}, not {goal.unit}")
    least = along.steps.costs.min()
    if least > goal.amount * (1 + 1e-9):
        raise InvalidInput(f"{goal}: no threshold costs less than {least:.4g} {unit} a prompt")


def _percent(share: float) -> str:
    return f"{100 * share:.4g} %"
