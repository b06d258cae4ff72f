"""A router's probabilities and threshold set anew, on new labels or for a new goal."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pliant.errors import InvalidInput
from pliant.routing import router_file
from pliant.routing.fitting import training_hashes
from pliant.routing.fitting.fit import entry, of_goal, reference
from pliant.routing.goals.goal import Goal
from pliant.routing.goals.thresholds import Threshold
from pliant.routing.open import open_scorer
from pliant.routing.outcomes import Outcomes

_LEAST = 50


@dataclass(frozen=True)
class Calibrated:
    """What was set."""

    threshold: Threshold
    left_out: int
    """Prompts that the router's scorer was made on."""

    def as_dict(self) -> dict[str, Any]:
        return {"threshold": self.threshold.to_json(), "left_out": self.left_out}


def calibrate(
    router: str | Path, outcomes: Outcomes, goal: str | Goal, kind: str = "platt"
) -> Calibrated:
    """Write a router's calibration, threshold and reference scores anew; the scorer stays.

    Prompts that the scorer was trained or chosen on are left out; those that an earlier threshold
    was made on serve again. All of them count from then on as prompts that the router was made on.
    """
    folder = Path(router).expanduser()
    file = router_file.read(folder)
    outcomes = outcomes.of_models(file.names)
    if outcomes.unit != file.unit:
        raise InvalidInput(f"the labels' costs are in {outcomes.unit}, the router's in {file.unit}")
    known = training_hashes.learned(folder, outcomes.prompts)
    if (~known).sum() < _LEAST:
        raise InvalidInput(
            f"{(~known).sum()} of these {len(known):,} prompts are new to the router: "
            f"{_LEAST} or more are due"
        )
    held = outcomes.select(np.flatnonzero(~known))
    scorer = open_scorer(folder, file)
    predicted = scorer.predict(held.asked, held.groups)
    goal = Goal.parse(goal) if isinstance(goal, str) else goal
    chosen = of_goal(goal, predicted, held, file.costs, file.novel_to)
    content = file.model_dump()
    now = reference(predicted, held, kind)
    if file.drift is not None and "drift" in now:  # how it is watched is the user's to say
        now["drift"] |= {name: getattr(file.drift, name) for name in ("window", "false_alarms")}
    content |= {"threshold": entry(chosen, None), **now}
    made = router_file.made(**content)
    training_hashes.add(
        folder, held.prompts
    )  # before the file: better to know too many than too few
    made.write(folder)
    return Calibrated(chosen, int(known.sum()))
