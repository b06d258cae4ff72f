"""`pliant route calibrate`: new probabilities and a new threshold for a router, nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EXAMPLE = 'pliant route calibrate --router my-router --labels new.jsonl --goal "30 % of calls"'


def calibrate(
    router: Annotated[Path, typer.Option(help="The folder that `pliant route fit` has made.")],
    labels: Annotated[str, typer.Option(help="Labels that it was not trained on.")],
    goal: Annotated[str, typer.Option(help="A budget, a quality or a risk, in words.")] = (
        "95 % of the large model's quality"
    ),
    model: Annotated[
        list[str] | None, typer.Option(help="The columns of the models, the cheapest first.")
    ] = None,
    calibration: Annotated[str, typer.Option(help="platt, temperature or isotonic.")] = "platt",
    question_column: Annotated[
        str, typer.Option(help="Names the question, where several prompts word the same one.")
    ] = "question",
    limit: Annotated[int | None, typer.Option(help="Only the first labels.", min=1)] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Set a router's probabilities and its threshold anew, on new labels or for a new goal.

    The scorer stays as it is. Prompts that it was trained or chosen on are left out.
    """
    from transformers.utils import logging

    from pliant.cli import terminal
    from pliant.routing.fitting.calibrate import calibrate as set_anew
    from pliant.routing.outcomes import Outcomes

    logging.disable_progress_bar()
    outcomes = Outcomes.read(labels, models=model or None, question=question_column, limit=limit)
    done = set_anew(router, outcomes, goal, calibration)
    if json:
        terminal.print_json(done.as_dict())
        return
    console = terminal.console()
    if done.left_out:
        console.print(f"{done.left_out:,} prompts left out: the scorer was made on them")
    console.print(str(done.threshold), markup=False, soft_wrap=not console.is_terminal)
