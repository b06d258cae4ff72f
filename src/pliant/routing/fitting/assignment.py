"""The control for a router whose labels have groups: the best fixed assignment of groups to models.

Each group goes to the model that is right most often on the training labels of that group, less
lambda times its price; small groups are shrunk towards the mean of all. That needs to know the
group of every prompt, which a router may not: it is a control all the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pliant.routing.decision_rule import sweep
from pliant.routing.outcomes import Outcomes
from pliant.routing.scorers import Predictions
from pliant.stats import Floats


def assigned(
    by_group: Predictions, outcomes: Outcomes, budget: float, prices: Sequence[float]
) -> Floats:
    """(n,) how often the best assignment at this mean cost is right on each prompt.

    `by_group` are the predictions of the scorer `group`, fitted on training labels. Between two
    assignments, one below the budget and one above, a random choice of the two spends all of it.
    Only costs of these prompts are used to meet the budget, and none of their grades.
    """
    swept = sweep(by_group.gain, outcomes, prices, novel_to=None)
    values = swept.steps.values
    values = np.unique(np.concatenate([[0.0], values[values > 0], [np.inf]]))[::-1]
    before: tuple[Floats, float] | None = None
    for value in values:  # from the cheapest assignment to the one that is right most often
        right, costs = outcomes.routed(swept.choose(float(value)))
        cost = float(costs.mean())
        if cost > budget * (1 + 1e-9):
            if before is None or cost <= before[1]:
                return right if before is None else before[0]
            part = (budget - before[1]) / (cost - before[1])
            return np.asarray((1 - part) * before[0] + part * right)
        before = right, cost
    assert before is not None
    return before[0]
