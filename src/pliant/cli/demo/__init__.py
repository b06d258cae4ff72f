"""`pliant demo`: what Pliant does, on the embedded models, in about a minute."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge

from pliant.cli import terminal

if TYPE_CHECKING:
    from pliant.cli.demo.size import Size
    from pliant.reports.page import Section, Top

    Chapter = tuple[dict[str, Any], Section, Top]

REAL_STEPS = 12
"""A real model trains with the operations of so many standard steps."""
NEXT = """What next?
  pliant doctor MODEL             what can be done with a model of yours, from its config alone
  pliant route label --help       label 50 prompts of yours, or more, then: pliant route fit
  pliant gradients audit --help   does training on selected tokens help with your data?
  pliant prune MODEL --help       a smaller stock model, with the curve of what it costs
  pliant expert train --help      a specialist by reward, in a file of kilobytes
  pliant demo --full              this demo with more questions, labels and steps
"""


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    questions: int = 500
    """How many test questions to measure the accuracies on."""
    seed: int = 0
    """Picks the test questions."""
    full: bool = False
    """More labels and longer trainings: about two minutes."""
    steps: Annotated[int | None, Ge(1)] = None
    """Each way of training gets the operations of so many standard steps. Default: 20; 40 with
    --full; 12 with --real."""
    page: Path = Path("pliant-demo.html")
    """Where to write the page."""
    real: bool = False
    """A real model, smollm2-135m, on real English instead; fetch it first."""
    json: bool = False
    """Print one JSON document."""


def demo(options: DemoOptions) -> None:
    """Ask two embedded models a range of questions: who is right, and at what cost?

    Then train a router between the two on the spot, and measure what it saves. Then teach the small
    model something new in three ways, at the same cost: which tokens should it train on? Then the
    large model loses a quarter of its channels, and answers the same questions again. In the end it
    learns two new wordings by reward, and each prompt picks its own expert.

    Takes about a minute on two cores, and ends with one HTML page that shows the same as pictures
    and needs no network.

    With --real: SmolLM2 on Python's language reference, which takes longer. It scores a prompt
    while it answers, learns which passages will be hard, and trains on selected tokens.

    Example: pliant demo --questions 1000 --page demo.html
    """
    from pliant.errors import InvalidInput
    from pliant.reports.page import Top, check_writable, write

    terminal.hide_loading_bars()
    if options.questions < 50:
        raise InvalidInput(
            f"--questions is {options.questions}; 50 or more give each difficulty a few"
        )
    check_writable(options.page)
    results: dict[str, Any] = {}
    sections: list[Section] = []
    tops: list[Top] = []
    for number, (result, section, top) in enumerate(_chapters(options), start=1):
        results |= result
        sections.append(section)
        tops.append(top)
        if not options.json:
            _print(number, section)
    verdict = next((top.verdict for top in tops if top.verdict is not None), None)
    figures = [figure for top in tops for figure in top.figures]
    whole = Top(verdict, figures, options.seed)
    page = write(options.page, "Pliant: compute where it matters", sections, whole)
    if options.json:
        terminal.print_json({**results, "page": str(page)})
        return
    terminal.print_text(f"The same as pictures: {page}\n\n{NEXT}")


def _print(number: int, section: Section) -> None:
    """A heading, the chapter's findings and its tables, with blank lines between them."""
    terminal.print_heading(f"{number}. {section.title}")
    for sentence in section.sentences:
        terminal.print_text(f"{sentence}\n")
    terminal.draw(section.tables, (), section.texts)


def _chapters(options: DemoOptions) -> Iterator[Chapter]:
    """Each chapter as soon as it is measured: results for JSON, what is shown, its figures."""
    if options.real:
        yield from _real(options)
        return
    from pliant.cli.demo.size import FULL, SHORT

    size = FULL if options.full else SHORT
    _announce(f"Five chapters on two embedded models: about {size.minutes} on two cores.")
    if options.steps is not None:
        size = replace(size, race_steps=options.steps)
    with _one_thread():
        yield from _embedded(options, size)


@contextmanager
def _one_thread() -> Iterator[None]:
    """More gain nothing with models this small, and wait for each other on a busy machine.

    With one, no sum depends on the number of cores.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _embedded(options: DemoOptions, size: Size) -> Iterator[Chapter]:
    from pliant.cli.demo import router, smaller, specialists, tokens, two_models
    from pliant.reports.page import Top

    measured = two_models.measure(options.questions, options.seed)
    yield {"two_models": measured.as_dict()}, two_models.section(measured), Top()
    routed = router.measure(measured, size)
    yield {"router": routed.as_dict()}, router.section(measured, routed), router.top(routed)
    trained = tokens.measure(size)
    top = Top(None, tokens.figures(trained))
    yield {"tokens": trained.race.as_dict()}, tokens.section(trained), top
    pruned = smaller.measure(measured)
    top = Top(None, [smaller.figure(pruned)])
    yield {"smaller": pruned.as_dict()}, smaller.section(pruned), top
    taught = specialists.measure(measured, size)
    top = Top(None, [specialists.figure(taught)])
    yield {"specialists": taught.as_dict()}, specialists.section(taught), top


def _real(options: DemoOptions) -> Iterator[Chapter]:
    from pliant.cli.demo import real
    from pliant.loading import load
    from pliant.reports.page import Top

    model, tokenizer = load(real.MODEL, dtype="float32")
    _announce(f"Three chapters on {real.MODEL}: some minutes.")
    results = real.measure(model, tokenizer, options.steps or REAL_STEPS, options.seed)
    chapters = zip(
        results.as_dict().items(),
        real.sections(results, real.MODEL),
        real.figures(results),
        strict=True,
    )
    for (name, result), section, figure in chapters:
        yield {name: result}, section, Top(None, [figure])


def _announce(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)
