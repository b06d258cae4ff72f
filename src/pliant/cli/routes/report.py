"""`pliant route report`: everything about a router as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pliant.cli.routes.report_data import Measured, ReportData
    from pliant.routing.router_file import RouterFile

EXAMPLE = "pliant route report --router my-router --labels test.jsonl --out report.html"
_GROUPS = 12  # more are on the page alone


def report(
    router: Annotated[Path, typer.Option(help="The folder that `pliant route fit` has made.")],
    out: Annotated[Path, typer.Option(help="The page (.html).")],
    labels: Annotated[
        str | None,
        typer.Option(help="Labels of other prompts. Left out: what the fit measured."),
    ] = None,
    evaluation: Annotated[
        Path | None,
        typer.Option(help="Instead of labels: what `pliant route evaluate --json` printed."),
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
    from pliant.cli.routes.report_data import (
        ReportData,
        fit_record,
        ledger_totals,
        read_evaluation,
    )
    from pliant.errors import InvalidInput
    from pliant.reports import page
    from pliant.routing import router_file

    logging.disable_progress_bar()
    folder, out = router.expanduser(), out.expanduser()
    if out.is_dir():
        raise InvalidInput(f"--out {out}: a folder; name the page, as in {out / 'report.html'}")
    if labels is not None and evaluation is not None:
        raise InvalidInput("--labels and --evaluation: name one of the two")
    file = router_file.read(folder)
    totals = ledger_totals(folder, file, ledger)
    measured, ladder = fit_record(folder, file)
    if evaluation is not None:
        measured = read_evaluation(evaluation.expanduser(), file)
    if labels is not None:
        measured = _measured(folder, file, out, labels, model, question_column, limit)
    data = ReportData(folder, file, measured, ladder, totals)
    written = page.write(out, pages.title(data), pages.sections(data))
    if json:
        terminal.print_json({**data.as_dict(), "page": str(written)})
    else:
        _draw(data)
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
    from pliant.cli.routes.report_data import Measured
    from pliant.errors import InvalidInput
    from pliant.reports import page
    from pliant.routing.fitting.evaluate import evaluate
    from pliant.routing.outcomes import Outcomes

    outcomes = Outcomes.read(labels, models=models or None, question=question, limit=limit)
    if outcomes.unit != file.unit:
        raise InvalidInput(f"the labels' costs are in {outcomes.unit}, the router's in {file.unit}")
    page.make_room(out)  # before the work, but not before the labels are checked
    evaluation = evaluate(folder, outcomes)
    return Measured(evaluation, f"{evaluation.report.n:,} prompts of {Path(labels).name}")


def _draw(data: ReportData) -> None:
    from pliant.cli import terminal
    from pliant.cli.routes import report_page as pages
    from pliant.cli.routes import report_tables as tables

    console = terminal.console()

    def say(sentences: list[str]) -> None:
        for sentence in sentences:
            console.print(sentence, markup=False, soft_wrap=not console.is_terminal)
        if sentences:
            console.print()

    say(pages.summary(data))
    measured = data.measured
    if measured is not None:
        drawn = [tables.points(data, measured), tables.metrics(data, measured)]
        drawn.append(tables.baselines(measured, narrow=True))
        if not measured.outdated:
            if measured.evaluation.calibration:
                drawn.append(tables.probabilities(measured))
            if 0 < len(measured.evaluation.groups) <= _GROUPS:
                drawn.append(tables.groups(data, measured))
        for table in drawn:
            table.draw(console)
    if data.file.label_cost:
        tables.labels(data).draw(console)
    say(pages.label_sentences(data))
    if data.totals is not None:
        tables.calls(data).draw(console)
    say(pages.ledger_sentences(data))
