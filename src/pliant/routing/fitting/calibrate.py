"""New probabilities and a new threshold for a router, from new labels or for a new goal."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pliant.errors import InvalidInput
from pliant.routing import router_file
from pliant.routing.fitting import training_hashes
from pliant.routing.fitting.fit import choose_threshold, reference, threshold_entry
from pliant.routing.goals.goal import Goal
from pliant.routing.goals.thresholds import Threshold
from pliant.routing.open import open_scorer
from pliant.routing.outcomes import Outcomes

_LEAST = 50


@dataclass(frozen=True)
class Calibrated:
    """The new threshold."""

    threshold: Threshold
    left_out: int
    """Prompts that the router's scorer was fitted on."""

    def as_dict(self) -> dict[str, Any]:
        return {"threshold": self.threshold.to_json(), "left_out": self.left_out}


def calibrate(
    router: str | Path, outcomes: Outcomes, goal: str | Goal, kind: str = "platt"
) -> Calibrated:
    """Replace a router's calibration, threshold and reference scores; the scorer stays.

    Prompts that the scorer was trained or chosen on are left out; those that an earlier threshold
    was chosen on are used again. From then on the router counts as fitted on all of them.
    """
    folder = Path(router).expanduser()
    file = router_file.read(folder)
    outcomes = outcomes.of_models(file.names)
    if outcomes.unit != file.unit:
        raise InvalidInput(f"the labels' costs are in {outcomes.unit}, the router's in {file.unit}")
    learned = training_hashes.learned(folder, outcomes.prompts)
    if (~learned).sum() < _LEAST:
        raise InvalidInput(
            f"{(~learned).sum()} of these {len(learned):,} prompts are new to the router: "
            f"{_LEAST} or more are needed"
        )
    held = outcomes.select(~learned)
    predictions = open_scorer(folder, file).predict(held.asked, held.groups)
    goal = Goal.parse(goal) if isinstance(goal, str) else goal
    chosen = choose_threshold(goal, predictions, held, file.costs, file.novel_to)
    new = reference(predictions, held, kind)
    if file.drift is not None and "drift" in new:  # how drift is watched is the user's choice
        new["drift"] |= {name: getattr(file.drift, name) for name in ("window", "false_alarms")}
    content = file.model_dump() | {"threshold": threshold_entry(chosen, None), **new}
    changed = router_file.make(**content)
    # Before the file: if this stops in between, too many prompts are left out, not too few.
    training_hashes.add(folder, held.prompts)
    changed.write(folder)
    return Calibrated(chosen, int(learned.sum()))
