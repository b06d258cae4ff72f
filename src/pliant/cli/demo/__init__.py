"""`pliant demo`: what Pliant does, on the embedded models, in a minute or two."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge

from pliant.cli import terminal

if TYPE_CHECKING:
    from pliant.reports.page import Section

REAL_SECONDS = 10
"""How many times as long a real model trains as an embedded one."""


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
    real: bool = False
    """A real model, smollm2-135m, on real English instead; fetch it first."""
    json: bool = False
    """Print one JSON document."""


def demo(options: DemoOptions) -> None:
    """Ask two embedded models a range of questions: who is right, and at what cost?

    Then train a router between the two on the spot, and measure what it saves. Then teach the small
    model something new in three ways, in the same time: which tokens should it train on? Then the
    large model loses a quarter of its channels, and answers the same questions again. In the end it
    learns two new wordings by reward, and each prompt picks its own expert.

    Ends with one HTML page that shows the same as pictures and needs no network.

    With --real: SmolLM2 on Python's language reference, which takes longer. It scores a prompt
    while it answers, learns which passages will be hard, and trains on selected tokens.

    Example: pliant demo --questions 1000 --page demo.html
    """
    from pliant.errors import InvalidInput
    from pliant.reports.page import check_writable, write

    terminal.hide_loading_bars()
    if options.questions < 50:
        raise InvalidInput(
            f"--questions is {options.questions}; 50 or more give each difficulty a few"
        )
    check_writable(options.page)
    if options.real:
        results, sections = _real(options)
    else:
        results, sections = _embedded(options)
    page = write(options.page, "Pliant: compute where it matters", sections)
    if options.json:
        terminal.print_json({**results, "page": str(page)})
        return
    for section in sections:
        terminal.draw(section.tables, section.sentences, section.texts)
    terminal.print_text(f"\nThe same as pictures: {page}")


def _embedded(options: DemoOptions) -> tuple[dict[str, Any], list[Section]]:
    from pliant.cli.demo import router, smaller, specialists, tokens, two_models

    measured = two_models.measure(options.questions, options.seed)
    routed = router.measure(measured)
    trained = tokens.measure(options.seconds)
    pruned = smaller.measure(measured)
    taught = specialists.measure(measured)
    sections = [
        two_models.section(measured),
        router.section(measured, routed),
        tokens.section(trained),
        smaller.section(pruned),
        specialists.section(taught),
    ]
    chapters = {
        "two_models": measured.as_dict(),
        "router": routed.as_dict(),
        "tokens": trained.race.as_dict(),
        "smaller": pruned.as_dict(),
        "specialists": taught.as_dict(),
    }
    return chapters, sections


def _real(options: DemoOptions) -> tuple[dict[str, Any], list[Section]]:
    from pliant.cli.demo import real
    from pliant.loading import load

    model, tokenizer = load(real.MODEL, dtype="float32")
    results = real.measure(model, tokenizer, REAL_SECONDS * options.seconds, options.seed)
    return results.as_dict(), real.sections(results, real.MODEL)
