"""`pliant route fit`: from labels to a router, by way of a ladder of scorers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from pliant.reports.tables import Table
    from pliant.routing.fitting.fit import Fitted
    from pliant.routing.fitting.ladder import Rung
    from pliant.routing.outcomes import Outcomes
    from pliant.stats import Band

EXAMPLE = "pliant route fit --labels labels.jsonl --out my-router --base nano-s"


def fit(
    labels: Annotated[str, typer.Option(help="What `pliant route label` wrote, or another table.")],
    out: Annotated[Path, typer.Option(help="The router's folder.", file_okay=False)],
    model: Annotated[
        list[str] | None,
        typer.Option(help="Models of the labels, the cheapest first. Left out: by their cost."),
    ] = None,
    ladder: Annotated[
        bool,
        typer.Option("--ladder", help="Try every scorer, tfidf-logistic and text+group as well."),
    ] = False,
    scorer: Annotated[list[str] | None, typer.Option(help="Try this one; one option each.")] = None,
    base: Annotated[
        str | None, typer.Option(help="The model that cpx and probe read: the small one, say.")
    ] = None,
    goal: Annotated[
        str | None, typer.Option(help="In words. Left out: 95 % of the large model's quality.")
    ] = None,
    lam: Annotated[
        float | None, typer.Option(help="Instead of a goal: what a unit of cost is worth.", min=0)
    ] = None,
    calibration: Annotated[str, typer.Option(help="platt, temperature or isotonic.")] = "platt",
    backend: Annotated[
        list[str] | None,
        typer.Option(metavar="MODEL=BACKEND", help="How a model is reached, if not by its name."),
    ] = None,
    groups_known: Annotated[
        bool, typer.Option("--groups-known", help="Whoever routes knows each prompt's group.")
    ] = False,
    question_column: Annotated[
        str, typer.Option(help="Names the question, where several prompts word the same one.")
    ] = "question",
    limit: Annotated[int | None, typer.Option(help="Only the first labels.", min=1)] = None,
    seed: Annotated[
        int, typer.Option(help="Of the splits and of the training.", min=0, max=2**32 - 1)
    ] = 0,
    json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Fit a router: try scorers, keep the cheapest that is as good as the best, set its threshold.

    Ctrl-C leaves no half-written router: what was in the folder before still stands.
    """
    from pliant.cli import terminal
    from pliant.routing.fitting.fit import GOAL
    from pliant.routing.outcomes import Outcomes

    _refuse_both(goal, lam, ladder, scorer)
    done = _fitted(
        Outcomes.read(labels, models=model or None, question=question_column, limit=limit),
        labels,
        out,
        scorers=scorer,
        base=base,
        goal=GOAL if goal is None else goal,
        lam=lam,
        calibrate_by=calibration,
        backends=dict(_pair(text) for text in backend or []),
        groups_known=groups_known,
        every=ladder,
        seed=seed,
    )
    if json:
        terminal.print_json(done.as_dict())
    else:
        _draw(done, blind=not scorer and base is None)


def _fitted(outcomes: Outcomes, labels: str, out: Path, **how: Any) -> Fitted:
    """The router, with what the labels' rows say of their models and of what they cost."""
    from transformers.utils import logging

    from pliant.cli import terminal
    from pliant.routing.fitting.fit import fit as make_router
    from pliant.routing.labels.label import label_cost, reached

    logging.disable_progress_bar()
    known = Path(labels)
    return make_router(
        outcomes,
        out,
        reached=reached(known),
        label_cost=label_cost(known),
        progress=terminal.track,
        **how,
    )


def _refuse_both(
    goal: str | None, lam: float | None, ladder: bool, scorer: list[str] | None
) -> None:
    from pliant.errors import InvalidInput

    if goal is not None and lam is not None:
        raise InvalidInput("--goal and --lam: one of the two, for each sets the threshold")
    if ladder and scorer:
        raise InvalidInput("--ladder tries every scorer: leave --scorer out, or --ladder")


def _pair(text: str) -> tuple[str, str]:
    from pliant.errors import InvalidInput

    name, equals, backend = text.partition("=")
    if not (name and equals and backend):
        raise InvalidInput(f"--backend {text!r}: write it as MODEL=BACKEND")
    return name, backend


def _draw(done: Fitted, blind: bool) -> None:
    import numpy as np

    from pliant.cli import terminal
    from pliant.routing.fitting.ladder import READS_A_MODEL

    console, sizes = terminal.console(), done.parts.sizes()
    ladder_table(done).draw(console)
    found = done.evaluation
    sentences = [
        f"Kept: {_why(done)}",
        "Labels: " + ", ".join(f"{n:,} {name}" for name, n in sizes.items()) + ".",
        f"{done.parts.how[0].upper()}{done.parts.how[1:]}.",
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

    kind = done.kept.kind
    if done.kept.value.value == max(r.value.value for r in done.rungs):
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
    rows = [_row(rung, rung is done.kept) for rung in done.rungs]
    if what == "APGR":  # the most that there can be on these prompts
        most = f"{oracle_apgr(done.parts.ladder):.3f}"
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
