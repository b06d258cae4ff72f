"""`pliant demo`: what Pliant does, on the embedded models, in a minute or two."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pliant.cli.chapters.router import Routed
    from pliant.cli.chapters.two_models import TwoModels

EXAMPLE = "pliant demo --questions 1000 --page demo.html"


def demo(
    questions: Annotated[int, typer.Option(help="Test questions for the accuracies.")] = 500,
    seed: Annotated[int, typer.Option(help="Which test questions.")] = 0,
    seconds: Annotated[
        float, typer.Option(help="That each way of training gets, three times.", min=0.01)
    ] = 1.5,
    page: Annotated[Path, typer.Option(help="Where the page goes.", dir_okay=False)] = Path(
        "pliant-demo.html"
    ),
    json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Ask two embedded models a spread of questions: who is right, and what does it cost?

    Then a router between the two is trained on the spot, and answers: what does it save? And the
    small one is taught something new in three ways, to the clock: which tokens should it train on?

    Ends with one HTML page that shows the same as pictures; it opens from disk, without a network.
    """
    from transformers.utils import logging

    from pliant.cli import terminal
    from pliant.cli.chapters import router, tokens, two_models
    from pliant.errors import InvalidInput
    from pliant.reports.page import make_room, write

    logging.disable_progress_bar()  # two bars that are full before they are seen
    if questions < 50:
        raise InvalidInput(f"--questions is {questions}; 50 or more give each difficulty a few")
    make_room(page)
    found = two_models.measure(questions, seed)
    routed = router.measure(found)
    taught = tokens.measure(seconds)
    sections = [
        two_models.section(found),
        router.section(found, routed),
        tokens.section(taught),
    ]
    where = write(page, "Pliant: compute where it matters", sections)
    if json:
        chapters = {
            "two_models": _plain(found),
            "router": _plainly(routed),
            "tokens": taught.race.as_dict(),
        }
        terminal.print_json({**chapters, "page": str(where)})
        return
    console = terminal.console()
    for section in sections:
        for table in section.tables:
            table.draw(console)
        for sentence in section.sentences:
            console.print(sentence, markup=False, soft_wrap=not console.is_terminal)
        for text in section.texts:
            text.draw(console)
    console.print(f"\nThe same as pictures: {where}", markup=False, soft_wrap=True)


def _plain(found: TwoModels) -> dict[str, object]:
    """Without the long list of questions: their number and the shares say enough to a machine."""
    from pliant.nano import NAMES

    return {
        "shown": [asdict(shown) for shown in found.shown],
        "questions": len(found.asked),
        "accuracy": {name: found.share(name) for name in NAMES},
        "by_difficulty": {
            str(d): {name: found.share(name, d) for name in NAMES} for d in found.difficulties
        },
        "perfect_routing": {"accuracy": found.perfect(), "cost": found.perfect_cost()},
        "mean_flops": found.flops,
        "parameters": found.parameters,
    }


def _plainly(routed: Routed) -> dict[str, object]:
    """Without the curves, which are for the eye."""
    return {
        "goal": str(routed.threshold.goal),
        "trained": routed.trained,
        "share": routed.share,
        "accuracy": routed.quality,
        "of_large": routed.of_large.as_dict(),
        "cost": routed.cost,
        "apgr": routed.apgr.as_dict(),
        "turns": [asdict(turn) for turn in routed.turns],
    }
