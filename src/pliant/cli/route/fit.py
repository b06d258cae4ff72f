"""`pliant route fit`: from labels to a router, by way of a ladder of scorers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge, Le

from pliant.cli import terminal
from pliant.cli.route.options import LabelsOptions
from pliant.errors import InvalidInput
from pliant.options import Flag

if TYPE_CHECKING:
    from pliant.reports.tables import Table
    from pliant.routing.fitting.fit import Fitted
    from pliant.routing.fitting.ladder import Rung
    from pliant.stats import Band

EXAMPLE = "pliant route fit --labels labels.jsonl --out my-router --base nano-s"


@dataclass(frozen=True, kw_only=True)
class FitOptions(LabelsOptions):
    labels: str
    """The labels that `pliant route label` wrote, or another table."""
    out: Path
    """The router's folder."""
    ladder: bool = False
    """Try every scorer, including tfidf-logistic and text+group."""
    scorer: tuple[str, ...] = ()
    """Try this scorer; repeatable."""
    base: str | None = None
    """The model that the scorers cpx and probe read, usually the small one."""
    goal: str | None = None
    """In words. Default: 95 % of the large model's quality."""
    lam: Annotated[float, Ge(0)] | None = None
    """Instead of a goal: how much quality a unit of cost is worth."""
    calibration: str = "platt"
    """platt, temperature or isotonic."""
    backend: Annotated[tuple[str, ...], Flag(metavar="MODEL=BACKEND")] = ()
    """Where a model is served, if its name does not tell; repeatable."""
    groups_known: bool = False
    """The group of each prompt will be known when it is routed."""
    seed: Annotated[int, Ge(0), Le(2**32 - 1)] = 0
    """Seed of the splits and of the training."""

    def __post_init__(self) -> None:
        if self.goal is not None and self.lam is not None:
            raise InvalidInput("--goal and --lam both set the threshold: give one of them")
        if self.ladder and self.scorer:
            raise InvalidInput("--ladder tries every scorer: leave --scorer out, or --ladder")


def fit(options: FitOptions) -> None:
    """Fit a router: try scorers, keep the cheapest that ties with the best, set its threshold.

    Ctrl-C leaves no half-written router: the folder keeps what it held before.
    """
    fitted = _fitted(options)
    if options.json:
        terminal.print_json(fitted.as_dict())
    else:
        _draw(fitted, blind=not options.scorer and options.base is None)


def _fitted(options: FitOptions) -> Fitted:
    """The router, with the models and the cost that the labels' rows record."""
    from transformers.utils import logging

    from pliant.routing.fitting.fit import GOAL
    from pliant.routing.fitting.fit import fit as fit_router
    from pliant.routing.labels.label import backend_descriptions, label_cost

    outcomes = options.outcomes()
    backends = dict(_pair(text) for text in options.backend)
    logging.disable_progress_bar()
    path = Path(options.labels)
    return fit_router(
        outcomes,
        options.out,
        scorers=list(options.scorer) or None,
        base=options.base,
        goal=GOAL if options.goal is None else options.goal,
        lam=options.lam,
        calibrate_by=options.calibration,
        backends=backends,
        groups_known=options.groups_known,
        every=options.ladder,
        seed=options.seed,
        descriptions=backend_descriptions(path),
        label_cost=label_cost(path),
        progress=terminal.track,
    )


def _pair(text: str) -> tuple[str, str]:
    name, equals, backend = text.partition("=")
    if not (name and equals and backend):
        raise InvalidInput(f"--backend {text!r}: write it as MODEL=BACKEND")
    return name, backend


def _draw(done: Fitted, blind: bool) -> None:
    import numpy as np

    from pliant.routing.fitting.ladder import READS_A_MODEL

    console, sizes = terminal.console(), done.splits.sizes()
    ladder_table(done).draw(console)
    found = done.evaluation
    sentences = [
        f"Kept: {_why(done)}",
        "Labels: " + ", ".join(f"{n:,} {name}" for name, n in sizes.items()) + ".",
        f"{done.splits.how[0].upper()}{done.splits.how[1:]}.",
        done.file.threshold.sentence,
        f"On {found.report.n:,} test prompts: {found.routed.share:.1%} of calls to "
        f"{done.file.models[-1].name}, at {found.routed.of_strong} of its quality; "
        f"APGR {found.metrics['apgr']}, at most {found.report.oracle_apgr:.3f}.",
        f"Router: {done.folder}",
    ]
    if blind:
        names = ", ".join(READS_A_MODEL)
        sentences.insert(1, f"Not tried: {names}, which read a model (--base nano-s, say).")
    if not np.isfinite(found.report.oracle_apgr):
        sentences.insert(0, _nothing_to_gain(done))
    for sentence in sentences:
        console.print(sentence, markup=False, soft_wrap=not console.is_terminal)


def _why(done: Fitted) -> str:
    """Why this scorer was kept."""
    from pliant.routing.fitting.ladder import MARGIN

    kind = done.selected.kind
    if done.selected.value.value == max(r.value.value for r in done.rungs):
        return f"{kind}, the best; no cheaper one was shown to be within {MARGIN:g} of it."
    return f"{kind}, the cheapest a decision of those that can be kept and tie with the best."


def _nothing_to_gain(done: Fitted) -> str:
    weak, strong, found = done.file.names[0], done.file.names[-1], done.evaluation.report
    return (
        f"WARNING: on the test split {strong} is not better than {weak} (quality "
        f"{found.strong_quality:.3f} and {found.weak_quality:.3f}): "
        "there is nothing to route for. Are the models in the order of their cost?"
    )


def ladder_table(done: Fitted) -> Table:
    from pliant.reports.tables import Table
    from pliant.routing.metrics.ranking import oracle_apgr

    what = "APGR" if len(done.file.models) == 2 else "area"
    head = ["scorer", what, "behind the best (95 %)", "ms a decision", "size", "fitted in", ""]
    rows = [_row(rung, rung is done.selected) for rung in done.rungs]
    if what == "APGR":  # the most that there can be on these prompts
        most = f"{oracle_apgr(done.splits.ladder):.3f}"
        rows.insert(0, ["perfect routing", most, *["-"] * 4, ""])
    return Table("The ladder", head, rows, right=frozenset(head[1:6]), colours={"kept": "green"})


def _row(rung: Rung, kept: bool) -> list[str]:
    from pliant.reports.tables import size

    return [
        rung.kind,
        f"{rung.value.value:.3f}",
        "-" if rung.behind is None else _signed(rung.behind),
        f"{rung.ms:.2f}",
        size(rung.size),
        f"{rung.fit_seconds:.1f} s",
        "kept" if kept else "",
    ]


def _signed(band: Band) -> str:
    return f"{band.value:+.3f} [{band.low:+.3f}, {band.high:+.3f}]"
