"""`pliant route report`: all that there is to say of a router, as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pliant.cli.routes.gathered import Gathered, Measured
    from pliant.routing.router_file import RouterFile

EXAMPLE = "pliant route report --router my-router --labels test.jsonl --out report.html"
_GROUPS = 12  # more are on the page alone


def report(
    router: Annotated[Path, typer.Option(help="The folder that `pliant route fit` has made.")],
    out: Annotated[Path, typer.Option(help="The page (.html).")],
    labels: Annotated[
        str | None,
        typer.Option(help="Labels of other prompts. Left out: what the fit measured and kept."),
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="The columns of the models, the cheapest first.")
    ] = None,
    question_column: Annotated[
        str, typer.Option(help="Names the question, where several prompts word the same one.")
    ] = "question",
    limit: Annotated[int | None, typer.Option(help="Only the first labels.", min=1)] = None,
    ledger: Annotated[
        str | None, typer.Option(help="Another ledger than the router's own; none: without.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """One self-contained page: quality against cost, probabilities, scores, examples, the ledger.

    Measures the router on held-out labels; without any it shows what the fit measured.
    """
    from transformers.utils import logging

    from pliant.cli import terminal
    from pliant.cli.routes import report_page as pages
    from pliant.cli.routes.gathered import Gathered, kept, totals
    from pliant.errors import InvalidInput
    from pliant.reports import page
    from pliant.routing import router_file

    logging.disable_progress_bar()
    folder, out = router.expanduser(), out.expanduser()
    if out.is_dir():
        raise InvalidInput(f"--out {out}: a folder; name the page, as in {out / 'report.html'}")
    file = router_file.read(folder)
    books = totals(folder, file, ledger)
    measured, ladder = kept(folder, file)
    if labels is not None:
        measured = _measured(folder, file, out, labels, model, question_column, limit)
    found = Gathered(folder, file, measured, ladder, books)
    written = page.write(out, pages.title(found), pages.sections(found))
    if json:
        terminal.print_json({**found.as_dict(), "page": str(written)})
    else:
        _draw(found)
        terminal.console().print(f"Page: {written}", markup=False, soft_wrap=True)


def _measured(
    folder: Path,
    file: RouterFile,
    out: Path,
    labels: str,
    models: list[str] | None,
    question: str,
    limit: int | None,
) -> Measured:
    from pliant.cli.routes.gathered import measure
    from pliant.errors import InvalidInput
    from pliant.reports import page
    from pliant.routing.outcomes import Outcomes

    outcomes = Outcomes.read(labels, models=models or None, question=question, limit=limit)
    if outcomes.unit != file.unit:
        raise InvalidInput(f"the labels' costs are in {outcomes.unit}, the router's in {file.unit}")
    page.make_room(out)  # before the work, but not before the labels are known good
    return measure(folder, outcomes, Path(labels).name)


def _draw(found: Gathered) -> None:
    from pliant.cli import terminal
    from pliant.cli.routes import report_page as pages
    from pliant.cli.routes import report_tables as tables

    console = terminal.console()

    def say(sentences: list[str]) -> None:
        for sentence in sentences:
            console.print(sentence, markup=False, soft_wrap=not console.is_terminal)
        if sentences:
            console.print()

    say(pages.what_it_does(found))
    measured = found.measured
    if measured is not None:
        drawn = [tables.points(found, measured), tables.metrics(found, measured)]
        drawn.append(tables.baselines(measured, narrow=True))
        if not measured.outdated:
            if measured.content["calibration"]:
                drawn.append(tables.probabilities(measured))
            if 0 < len(measured.groups) <= _GROUPS:
                drawn.append(tables.groups(found, measured))
        for table in drawn:
            table.draw(console)
    if found.file.label_cost:
        tables.labels(found).draw(console)
    say(pages.label_sentences(found))
    if found.totals is not None:
        tables.calls(found).draw(console)
    say(pages.ledger_sentences(found))
