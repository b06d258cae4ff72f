"""`pliant route evaluate`: a router, measured on held-out prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pliant.cli import terminal
from pliant.cli.route import LabelsOptions, RouterOptions

if TYPE_CHECKING:
    from pliant.routing.fitting.evaluation import Evaluation


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(LabelsOptions, RouterOptions):
    pass


def evaluate(options: EvaluateOptions) -> None:
    """Measure a router on held-out labels, beside its baselines.

    Prompts that the router was fitted on are left out and counted.

    Example: pliant route evaluate --router my-router --labels test.jsonl
    """
    from pliant.cli.route import tables
    from pliant.routing.fitting.evaluate import evaluate as measure

    terminal.hide_loading_bars()
    evaluation = measure(options.router, options.outcomes())
    if options.json:
        terminal.print_json(evaluation.as_dict())
        return
    shown = [tables.metrics(evaluation), tables.baselines(evaluation)]
    if evaluation.calibration:
        shown.append(tables.probabilities(evaluation))
    terminal.draw(shown, sentences(evaluation))


def sentences(evaluation: Evaluation) -> list[str]:
    from pliant.cli.route.tables import novelty

    report, sentences = evaluation.report, []
    weak, strong = report.models[0], report.models[-1]
    if evaluation.left_out:
        sentences.append(
            f"WARNING: the router was fitted on {evaluation.left_out:,} of these prompts; they are "
            "left out of everything above."
        )
    return [
        *sentences,
        f"{report.n:,} prompts. {weak} alone {report.weak_quality:.3f}, {strong} alone "
        f"{report.strong_quality:.3f}, the best possible APGR {report.oracle_apgr:.3f}.",
        str(evaluation),
        *novelty(evaluation),
    ]
