"""`pliant route report`: everything about a router as one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pliant.cli import terminal
from pliant.cli.route import LabelsOptions, RouterOptions
from pliant.errors import InvalidInput

if TYPE_CHECKING:
    from pliant.cli.route.report_data import Measured, ReportData
    from pliant.reports.page import Section
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
    from pliant.cli.route import report_data
    from pliant.cli.route import report_page as pages
    from pliant.reports import page
    from pliant.routing import router_file

    terminal.hide_loading_bars()
    options.register_scorer()
    folder, out = options.router.expanduser(), options.out.expanduser()
    if out.is_dir():
        raise InvalidInput(f"--out {out}: a folder; name the page, as in {out / 'report.html'}")
    file = router_file.read(folder)
    totals = report_data.ledger_totals(folder, file, options.ledger)
    measured, ladder = report_data.fit_record(folder, file)
    if options.evaluation is not None:
        measured = report_data.read_evaluation(options.evaluation.expanduser(), file)
    if options.labels:
        measured = _measured(folder, file, out, options)
    data = report_data.ReportData(folder, file, measured, ladder, totals)
    sections = pages.sections(data)
    written = page.write(out, pages.title(data), sections, pages.top(data))
    if options.json:
        terminal.print_json({**data.as_dict(), "page": str(written)})
    else:
        _draw(data, sections[-2:])
        terminal.console().print(f"Page: {written}", markup=False, soft_wrap=True)


def _measured(folder: Path, file: RouterFile, out: Path, options: ReportOptions) -> Measured:
    from pliant.cli.route.report_data import Measured
    from pliant.reports import page
    from pliant.routing.fitting.evaluate import evaluate

    outcomes = options.outcomes()
    file.check_unit(outcomes.unit)
    page.check_writable(out)  # before the work, but not before the labels are checked
    evaluation = evaluate(folder, outcomes)
    return Measured(evaluation, f"{evaluation.report.n:,} prompts of {Path(options.labels).name}")


def _draw(data: ReportData, costs: Sequence[Section]) -> None:
    """What fits a terminal: the summary, the narrow tables, and the sections about costs."""
    from pliant.cli.route import report_page as pages
    from pliant.cli.route import tables

    drawn, measured = [], data.measured
    if measured is not None:
        drawn += [tables.points(data, measured), tables.metrics(measured.evaluation)]
        drawn.append(tables.baselines(measured.evaluation, narrow=True))
        if not measured.outdated:
            if measured.evaluation.calibration:
                drawn.append(tables.probabilities(measured.evaluation))
            if 0 < len(measured.evaluation.groups) <= _GROUPS:
                drawn.append(tables.groups(data, measured))
    terminal.draw((), [*pages.summary(data), ""])
    terminal.draw(drawn)
    for section in costs:
        terminal.draw(section.tables, section.sentences)
        if section.sentences:
            print()
