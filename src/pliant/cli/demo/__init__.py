"""`pliant demo`: what Pliant does, on the embedded models, in a minute or two."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import Ge

from pliant.cli import terminal


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    questions: int = 500
    """How many test questions to measure the accuracies on."""
    seed: int = 0
    """Picks the test questions."""
    seconds: Annotated[float, Ge(0.01)] = 1.5
    """How long each way of training gets, for each of three seeds."""
    page: Path = Path("pliant-demo.html")
    """Where to write the page."""
    json: bool = False
    """Print one JSON document."""


def demo(options: DemoOptions) -> None:
    """Ask two embedded models a range of questions: who is right, and at what cost?

    Then train a router between the two on the spot, and measure what it saves. Then teach the small
    model something new in three ways, in the same time: which tokens should it train on?

    Ends with one HTML page that shows the same as pictures and needs no network.

    Example: pliant demo --questions 1000 --page demo.html
    """
    from pliant.cli.demo import router, tokens, two_models
    from pliant.errors import InvalidInput
    from pliant.reports.page import check_writable, write

    terminal.hide_loading_bars()
    if options.questions < 50:
        raise InvalidInput(
            f"--questions is {options.questions}; 50 or more give each difficulty a few"
        )
    check_writable(options.page)
    measured = two_models.measure(options.questions, options.seed)
    routed = router.measure(measured)
    trained = tokens.measure(options.seconds)
    sections = [
        two_models.section(measured),
        router.section(measured, routed),
        tokens.section(trained),
    ]
    page = write(options.page, "Pliant: compute where it matters", sections)
    if options.json:
        chapters = {
            "two_models": measured.as_dict(),
            "router": routed.as_dict(),
            "tokens": trained.race.as_dict(),
        }
        terminal.print_json({**chapters, "page": str(page)})
        return
    for section in sections:
        terminal.draw(section.tables, section.sentences, section.texts)
    terminal.print_text(f"\nThe same as pictures: {page}")
