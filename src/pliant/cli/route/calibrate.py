"""`pliant route calibrate`: new probabilities and a new threshold for a router, nothing else."""

from __future__ import annotations

from dataclasses import dataclass

from pliant.cli import terminal
from pliant.cli.route import LabelsOptions, RouterOptions


@dataclass(frozen=True, kw_only=True)
class CalibrateOptions(LabelsOptions, RouterOptions):
    goal: str = "95 % of the large model's quality"
    """A budget, a quality or a risk, in words."""
    calibration: str = "platt"
    """platt, temperature or isotonic."""


def calibrate(options: CalibrateOptions) -> None:
    """Recompute a router's probabilities and threshold, on new labels or for a new goal.

    The scorer does not change. Prompts that it was fitted on are left out.

    Example: pliant route calibrate --router my-router --labels new.jsonl --goal "30 % of calls"
    """
    from pliant.routing.fitting.fit import calibrate as recalibrate

    terminal.hide_loading_bars()
    calibrated = recalibrate(options.router, options.outcomes(), options.goal, options.calibration)
    if options.json:
        terminal.print_json(calibrated.as_dict())
        return
    if calibrated.left_out:
        terminal.print_text(
            f"{calibrated.left_out:,} prompts left out: the router was fitted on them"
        )
    terminal.print_text(str(calibrated.threshold))
