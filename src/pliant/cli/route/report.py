"""`pliant route report`: everything about a router as one HTML page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pliant.cli import terminal
from pliant.cli.route import LabelsOptions, RouterOptions
from pliant.errors import InvalidInput

if TYPE_CHECKING:
    from pliant.cli.route.report_data import Measured, ReportData
    from pliant.routing.router_file import RouterFile

_GROUPS = 12  # more are on the page alone


@dataclass(frozen=True, kw_only=True)
class ReportOptions(LabelsOptions, RouterOptions):
    labels: str = ""
    """Labels of held-out prompts. Default: show what the fit measured."""
    out: Path
    """The page (.html)."""
    evaluation: Path | None = None
    """Instead of labels: the output of `pliant route evaluate --json`."""
    ledger: str | None = None
    """Another ledger than the router's own; none: leave it out."""

    def __post_init__(self) -> None:
        if self.labels and self.evaluation is not None:
            raise InvalidInput("--labels and --evaluation: give one of the two")


def report(options: ReportOptions) -> None:
    """One self-contained page: quality against cost, probabilities, scores, examples, the ledger.

    Measures the router on held-out labels; without any it shows what the fit measured.

    Example: pliant route report --router my-router --labels test.jsonl --out report.html
    """
    from pliant.cli.route import report_page as pages
    from pliant.cli.route.report_data import (
        ReportData,
        fit_record,
        ledger_totals,
        read_evaluation,
    )
    from pliant.reports import page
    from pliant.routing import router_file

    terminal.hide_loading_bars()
    folder, out = options.router.expanduser(), options.out.expanduser()
    if out.is_dir():
        raise InvalidInput(f"--out {out}: a folder; name the page, as in {out / 'report.html'}")
    file = router_file.read(folder)
    totals = ledger_totals(folder, file, options.ledger)
    measured, ladder = fit_record(folder, file)
    if options.evaluation is not None:
        measured = read_evaluation(options.evaluation.expanduser(), file)
    if options.labels:
        measured = _measured(folder, file, out, options)
    data = ReportData(folder, file, measured, ladder, totals)
    written = page.write(out, pages.title(data), pages.sections(data))
    if options.json:
        terminal.print_json({**data.as_dict(), "page": str(written)})
    else:
        _draw(data)
        terminal.console().print(f"Page: {written}", markup=False, soft_wrap=True)


def _measured(folder: Path, file: RouterFile, out: Path, options: ReportOptions) -> Measured:
    from pliant.cli.route.report_data import Measured
    from pliant.reports import page
    from pliant.routing.fitting.evaluate import evaluate

    outcomes = options.outcomes()
    if outcomes.unit != file.unit:
        raise InvalidInput(f"the labels' costs are in {outcomes.unit}, the router's in {file.unit}")
    page.check_writable(out)  # before the work, but not before the labels are checked
    evaluation = evaluate(folder, outcomes)
    return Measured(evaluation, f"{evaluation.report.n:,} prompts of {Path(options.labels).name}")


def _draw(data: ReportData) -> None:
    from pliant.cli.route import report_page as pages
    from pliant.cli.route import tables

    console = terminal.console()

    def say(sentences: list[str]) -> None:
        for sentence in sentences:
            terminal.print_text(sentence)
        if sentences:
            console.print()

    say(pages.summary(data))
    measured = data.measured
    if measured is not None:
        drawn = [tables.points(data, measured), tables.metrics(measured.evaluation)]
        drawn.append(tables.baselines(measured.evaluation, narrow=True))
        if not measured.outdated:
            if measured.evaluation.calibration:
                drawn.append(tables.probabilities(measured.evaluation))
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
