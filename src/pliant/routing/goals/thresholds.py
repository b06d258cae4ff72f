"""From a goal in words to a threshold on the predicted gain, and what it promises.

    # with the predictions and labels of the calibration split
    chosen = threshold("at most 2 % worse, with 95 % confidence", gain, outcomes)
    chosen.models_for(gain_of_other_prompts) # which model answers each of them
    print(chosen)                            # what was chosen, and what that promises

Of two models the strong one answers if the predicted gain is above the threshold. Of many (the
predictions are (n, m) then), the one with the highest gain - threshold * price does. Novel prompts
go where the router sends them, and count in every budget, quality and proof. A budget and a
quality hold on the calibration split, and on others as far as those are like it. A goal with a
confidence is proved: of all calibration splits that could have been drawn from one population, at
least that share lead to a threshold that keeps the goal on the population.

The proof (learn then test, Angelopoulos and others) tests the thresholds of a grid that does not
depend on the labels one after the other, from the safest (all to the strong model) or from 0 on,
each at level 1 - confidence, and selects the last before the first failure. It can select a wrong
one only if the first wrong one passes its test. The tests are those of risk.py. Where several
prompts word one question, each question counts once.

Where each prediction comes from a scorer that was fitted on the other folds, and the router's own
scorer is fitted on all of them, the proof is no longer exact: the threshold is that of other
scorers. It then has a wider margin (`cross_fitted`), and benchmarks/promises.py measures how often
it fails with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pliant.errors import InvalidInput
from pliant.routing.decision_rule import Chosen, DecisionRule, Sweep, sweep
from pliant.routing.goals.goal import Goal
from pliant.routing.goals.optimism import internal_target
from pliant.routing.goals.proof import Proof
from pliant.routing.outcomes import Outcomes
from pliant.routing.units import ONE, amount, percent
from pliant.stats import Floats, as_json

GRID = np.linspace(-1, 1, 2001)
"""The gains that are tested where no others are named: all there can be, by .001."""
_WORTH_MENTIONING = 0.1  # of calls, that more labels would save
_NO_ESTIMATE = 30  # times as many labels: the margin is too small to be known


@dataclass(frozen=True)
class Threshold:
    """Which prompts go to which model, and the result on the split that it was chosen on."""

    value: float
    """-inf sends every prompt to the strongest model, inf to the first (or `on` worth, to the
    cheapest)."""
    goal: Goal
    n: int
    """How many prompts the calibration split had."""
    shares: tuple[float, ...]
    """The share of these that went to each model."""
    quality: float
    weak_quality: float
    strong_quality: float
    cost: float
    """The mean cost of a prompt, in `unit`."""
    unit: str
    models: tuple[str, ...]
    on: Literal["gain", "worth"] = "gain"
    """gain: the last of two models answers where gain > value. worth: the model with the highest
    gain - value * price answers."""
    prices: tuple[float, ...] | None = None
    """The expected cost of each model's answer, for `worth`."""
    novel_to: int | None = None
    """The index of the model that answers novel prompts; None where none were flagged."""
    more_labels: tuple[int, float] | None = None
    """Where a goal is proved at a high price: about how many labelled prompts would probably prove
    it with a lower share of calls to the strongest model, and that share."""

    @property
    def share(self) -> float:
        """Of calls to the strongest model."""
        return self.shares[-1]

    def models_for(self, gain: ArrayLike, novel: ArrayLike | None = None) -> Chosen:
        """The index of the model that answers each prompt."""
        rule = DecisionRule(self.value, len(self.models), self.prices, self.novel_to)
        return rule.choose(gain, novel)

    def strong(self, gain: ArrayLike, novel: ArrayLike | None = None) -> NDArray[np.bool_]:
        """Which prompts go to the strongest model."""
        return self.models_for(gain, novel) == len(self.models) - 1

    def unlabelled(self) -> Threshold:
        """The same without qualities, for a split whose labels are not known."""
        return replace(self, quality=math.nan, weak_quality=math.nan, strong_quality=math.nan)

    @property
    def promise(self) -> str:
        """What it promises for other prompts."""
        if math.isnan(self.quality):
            return "Which quality that has is not known: these prompts have no labels."
        if self.goal.confidence is None:
            if self.goal.kind != "quality":
                return "This was so on the calibration split; it is no promise for other prompts."
            return (
                "Other prompts of the same kind can be expected to have that quality on average; "
                "it is no promise."
            )
        proved = (
            f"Of label sets drawn like this one, {100 * self.goal.confidence:.4g} % or more lead "
            "to a threshold that keeps this for all prompts of the same kind."
        )
        if self.more_labels is None:
            return proved
        labels, share = self.more_labels
        return (
            f"{proved} With about {labels:,} labelled prompts like these it could probably be met "
            f"at {percent(share)} of calls to {self.models[-1]}."
        )

    @property
    def rule(self) -> str:
        """The rule in words."""
        weak, strong = self.models[0], self.models[-1]
        if math.isinf(self.value):
            if self.value > 0 and self.prices is not None:
                weak = self.models[int(np.argmin(self.prices))]
            answers = strong if self.value < 0 else weak
            novel_to = answers if self.novel_to is None else self.models[self.novel_to]
            novel = "" if novel_to == answers else f", but novel prompts go to {novel_to}"
            return f"everything goes to {answers}{novel}"
        if self.on == "gain":
            return f"a predicted gain above {self.value:.4g} goes to {strong}, the rest to {weak}"
        price = f"{self.value:.4g} per {ONE[self.unit]}"
        return f"the model with the highest gain less {price} of its cost answers"

    def __str__(self) -> str:
        weak, strong = self.models[0], self.models[-1]
        calls = ", ".join(
            f"{percent(share)} of calls to {name}"
            for name, share in reversed(list(zip(self.models, self.shares, strict=True)))
        )
        if math.isnan(self.quality):
            split = f"{self.n:,} prompts without labels"
            return f"{self.goal}: {self.rule}. On {split} that was {calls}. {self.promise}"
        return (
            f"{self.goal}: {self.rule}. On {self.n:,} calibration prompts that was {calls}, at a "
            f"quality of {self.quality:.3f} ({weak} alone {self.weak_quality:.3f}, {strong} alone "
            f"{self.strong_quality:.3f}) and a mean cost of {amount(self.cost, self.unit)} a "
            f"prompt. {self.promise}"
        )

    def to_json(self) -> dict[str, Any]:
        """For a file; an infinite value is text, because JSON has no infinity."""
        value = self.value if math.isfinite(self.value) else str(self.value)
        return {**as_json(self), "value": value, "goal": str(self.goal)}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Threshold:
        try:
            fields = {**content, "value": float(content["value"])}
            for name in ("quality", "weak_quality", "strong_quality"):
                fields[name] = math.nan if content[name] is None else content[name]
            fields |= {name: tuple(content[name]) for name in ("models", "shares")}
            if fields.get("prices") is not None:
                fields["prices"] = tuple(fields["prices"])
            if fields.get("more_labels") is not None:
                fields["more_labels"] = tuple(fields["more_labels"])
            return cls(**{**fields, "goal": Goal.parse(content["goal"])})
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
    novel: ArrayLike | None = None,
    novel_to: int | None = -1,
    cross_fitted: bool = False,
) -> Threshold:
    """The threshold that meets a goal on the calibration split; a goal with a confidence is proved.

    `gain` is (n,) for two models or (n, m), gains over the first one; `prices` are the expected
    costs of each model's answer, by default its mean cost in these outcomes. `novel` flags the
    prompts that the router sends to the model `novel_to`, if any, whatever their gain. `grid`, for
    goals with a confidence, must not come from these predictions or labels: those of the training
    split will do, and GRID (over the range of the prices) for gains that are differences of
    probabilities. `cross_fitted`: predictions are out of fold, by other scorers than the one
    that the threshold is for, so a proof needs a wider margin.
    """
    goal = Goal.parse(goal) if isinstance(goal, str) else goal
    swept = sweep(gain, outcomes, prices, novel, novel_to)
    if goal.confidence is not None:
        tried = GRID * swept.unit_gain if grid is None else np.asarray(grid, dtype=np.float64)
        return _proved(Proof(goal, swept, cross_fitted), tried)
    steps = swept.steps
    if goal.kind == "quality":
        return _at(goal, swept, _value_for_quality(goal, swept))
    if goal.kind == "cost":
        goal.check_unit(outcomes.unit)
        (meets,) = np.nonzero(steps.costs <= goal.amount * (1 + 1e-9))
    else:
        (meets,) = np.nonzero(steps.shares <= goal.amount + 1e-12)
    if not len(meets):
        raise InvalidInput(f"{goal}: {_least(goal, swept)}")
    prices = swept.rule.prices
    ascend = prices is None or bool((np.diff(prices) >= 0).all())
    # A strong model that is cheap: then the fewest savings are not the best that is affordable.
    at = meets[-1] if ascend else meets[steps.qualities[meets].argmax()]
    return _at(goal, swept, float(steps.values[at]))


def values_by_share(swept: Sweep, steps: int) -> list[float]:
    """The value at which at most 0, 1 / steps, ... 1 of the calls go to the strongest model; inf
    where novel prompts alone are more."""
    shares, values = swept.steps.shares, []
    for limit in np.arange(steps + 1) / steps:
        within = np.where(shares <= limit + 1e-12, shares, -1.0)
        at = int(within.argmax())
        values.append(float(swept.steps.values[at]) if within[at] >= 0 else math.inf)
    return values


# --- choosing ------------------------------------------------------------------------------------


def _at(goal: Goal, swept: Sweep, value: float) -> Threshold:
    """The threshold, and what it does on this split."""
    outcomes, rule, chosen = swept.outcomes, swept.rule, swept.choose(value)
    right, cost = outcomes.routed(chosen)
    return Threshold(
        value,
        goal,
        len(outcomes),
        tuple(outcomes.shares(chosen).tolist()),
        float(right.mean()),
        float(outcomes.weak.mean()),
        float(outcomes.strong.mean()),
        float(cost.mean()),
        outcomes.unit,
        outcomes.models,
        "gain" if rule.prices is None else "worth",
        None if rule.prices is None else tuple(rule.prices),
        rule.novel_to,
    )


def _value_for_quality(goal: Goal, swept: Sweep) -> float:
    """The value with the fewest calls to the strongest model that has the quality, on average on
    other prompts too."""
    steps, strong = swept.steps, swept.outcomes.strong.mean()
    (meets,) = np.nonzero(steps.qualities >= goal.amount * strong - 1e-12)
    if not len(meets):
        raise InvalidInput(
            f"{goal}: no threshold has a quality above {steps.qualities.max():.4g}, because "
            f"novel prompts go to {_novel_model(swept)}"
        )
    if swept.outcomes.strong_costs_no_more:  # then calls to the others save nothing
        return float(steps.values[meets[steps.qualities[meets].argmax()]])
    target = internal_target(goal.amount, swept)
    (surely,) = np.nonzero(steps.qualities >= target * strong - 1e-12)
    return float(steps.values[surely[0] if len(surely) else meets[-1]])


def _proved(proof: Proof, grid: Floats) -> Threshold:
    """The last threshold of the grid before the first that is not proved."""
    goal, swept = proof.goal, proof.swept
    if grid.ndim != 1 or not len(grid) or np.isnan(grid).any():
        raise InvalidInput("grid must be a row of numbers")
    value = proof.last(grid)
    if value is None:
        raise InvalidInput(
            f"{goal}: not proved even if every prompt but the novel ones goes to "
            f"{swept.outcomes.models[-1]}, because novel prompts go to {_novel_model(swept)}"
        )
    chosen = _at(goal, swept, value)
    return replace(chosen, more_labels=_more_labels(proof, chosen))


def _more_labels(proof: Proof, chosen: Threshold) -> tuple[int, float] | None:
    """About how many labels would prove half of what the same goal saves where nothing is proved,
    and its share of calls; None where that is little, or where no estimate
    is possible."""
    goal, swept = proof.goal, proof.swept
    amount = goal.share_of_quality(float(swept.outcomes.strong.mean()))
    if swept.outcomes.strong_costs_no_more or amount is None or amount < 0:
        return None
    try:
        unproved = _at(goal, swept, _value_for_quality(Goal("quality", amount), swept))
    except InvalidInput:  # novel prompts alone are too bad
        return None
    aim = (chosen.share + unproved.share) / 2
    if chosen.share - unproved.share < _WORTH_MENTIONING:
        return None
    at = int(np.abs(swept.steps.shares - aim).argmin())
    labels = proof.labels_for(float(swept.steps.values[at]))
    if not 1.1 < labels / len(swept.outcomes) < _NO_ESTIMATE:
        return None
    scale = 10 ** max(0, math.floor(math.log10(labels)) - 1)  # two digits: it is an estimate
    return math.ceil(labels / scale) * scale, float(swept.steps.shares[at])


def _least(goal: Goal, swept: Sweep) -> str:
    """What the smallest possible budget is."""
    steps, unit = swept.steps, swept.outcomes.unit
    if goal.kind == "cost":
        return f"no threshold costs less than {amount(steps.costs.min(), unit)} a prompt"
    strong, prices = swept.outcomes.models[-1], swept.rule.prices
    if prices is not None and prices[-1] <= min(prices):
        return f"{strong} is the strongest model and the cheapest, so fewer calls save nothing"
    return (
        f"no threshold sends less than {100 * steps.shares.min():.4g} % of calls to "
        f"{strong}: so many prompts are novel, and go there whatever their "
        'gain. Allow more, or let novel prompts be routed by their gain ("novel": "ignore" in '
        "router.json, then calibrate)"
    )


def _novel_model(swept: Sweep) -> str:
    assert swept.rule.novel_to is not None
    return swept.outcomes.models[swept.rule.novel_to]
