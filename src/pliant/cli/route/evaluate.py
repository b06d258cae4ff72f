"""`pliant route evaluate`: a router, measured on held-out prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pliant.cli import terminal
from pliant.cli.route.options import LabelsOptions, RouterOptions

if TYPE_CHECKING:
    from pliant.reports.tables import Table
    from pliant.routing.fitting.evaluation import Evaluation

EXAMPLE = "pliant route evaluate --router my-router --labels test.jsonl"


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(LabelsOptions, RouterOptions):
    pass


def evaluate(options: EvaluateOptions) -> None:
    """Measure a router on held-out labels, beside its baselines.

    Prompts that the router was fitted on are left out and counted.
    """
    from transformers.utils import logging

    from pliant.routing.fitting.evaluate import evaluate as measure

    logging.disable_progress_bar()
    evaluation = measure(options.router, options.outcomes())
    if options.json:
        terminal.print_json(evaluation.as_dict())
        return
    for table in tables(evaluation):
        table.draw(terminal.console())
    for sentence in sentences(evaluation):
        terminal.print_text(sentence)


def tables(found: Evaluation) -> list[Table]:
    """Metrics with their bands, the baselines beside them, and how the probabilities are kept."""
    from pliant.reports.tables import Table

    head = ["", found.scorer, *found.baselines]
    rows = [
        [name, str(band), *(str(said.metrics[name]) for said in found.baselines.values())]
        for name, band in found.metrics.items()
    ]
    made = [Table("On held-out prompts, with 95 % bands", head, rows, right=frozenset(head[1:]))]
    if found.calibration:
        head = ["P(right)", "ECE", "a constant's", "Brier", "a constant's Brier", "skill"]
        rows = [
            [
                kept.model,
                f"{kept.ece:.3f}",
                f"{kept.ece_constant:.3f}",
                f"{kept.brier:.3f}",
                f"{kept.brier_constant:.3f}",
                "-" if kept.skill is None else f"{kept.skill:.2f}",
            ]
            for kept in found.calibration
        ]
        made.append(Table("Probabilities", head, rows, right=frozenset(head[1:])))
    return made


def sentences(found: Evaluation) -> list[str]:
    report = found.report
    weak, strong = report.models[0], report.models[-1]
    said = []
    if found.left_out:
        said.append(
            f"WARNING: {found.left_out:,} of these prompts are among those that the router was "
            "made on; they were left out, and count nowhere above."
        )
    said.append(
        f"{report.n:,} prompts. {weak} alone {report.weak_quality:.3f}, {strong} alone "
        f"{report.strong_quality:.3f}, the best possible APGR {report.oracle_apgr:.3f}."
    )
    said.append(str(found))
    if found.novel is not None:
        said.append(f"{found.novel:.1%} of the prompts are unlike those that it was made on.")
    if found.paraphrases is not None:
        same = found.paraphrases
        said.append(
            f"Of {same.questions:,} questions in several wordings {same.same_model:.1%} go to one "
            f"model in all of them; the predicted gain moves by {same.spread:.3f} on average."
        )
    return said
