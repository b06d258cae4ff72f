"""An audit and a race as sentences, tables and a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pliant.gradients.audit import Audit, Race
    from pliant.reports.page import Section
    from pliant.reports.tables import Table


def sections(found: Audit, ran: Race | None) -> list[Section]:
    from pliant.reports.page import Section

    notes = dict.fromkeys(note for finding in found.findings for note in finding.notes)
    about = (
        f"Of {found.sequences} sequences with {found.tokens:,} labelled tokens in "
        f"{found.batches} batches; {found.draws} draws of each rule that draws."
    )
    steps = Section(
        "One step of each", [found.sentence, about, *READING, *notes], tables=[steps_table(found)]
    )
    if ran is None:
        return [steps]
    raced = Section(
        "A race",
        [ran.sentence],
        tables=[race_table(ran)],
        pictures=[(race_picture(ran), RACE_CAPTION)],
    )
    return [steps, raced]


READING = (
    "Cosine, length and bias are those of a draw's gradient, beside the full gradient of the same "
    "batch; bias is the length of the expected error and variance its spread, as shares of the "
    "full gradient's (squared) length. Speed is standard training's time over a step's, turn by "
    "turn; memory is the peak beside the weights; operations are counted.",
)
RACE_CAPTION = (
    "Loss on held-out pieces over the race: the mean of the seeds and, where it is shaded, the "
    "limits between which they lie."
)


def steps_table(found: Audit) -> Table:
    from pliant.reports.tables import Table

    head = ["", "cosine", "length", "bias", "variance", "ms", "speed", "memory", "operations"]
    cells = []
    for finding in found.findings:
        quality, cost = finding.quality, finding.cost
        cells.append(
            [
                finding.name,
                f"{quality.cosine.value:.2f}",
                f"{quality.norm:.2f}",
                f"{quality.bias:.2f}",
                f"{quality.variance:.2f}",
                f"{1000 * cost.seconds:.1f}",
                f"{cost.speed.value:.2f}",
                f"{found.memory(finding):.2f}",
                "-" if cost.operations is None else f"{cost.operations:.2f}",
            ]
        )
    return Table("A step of each", head, cells, right=frozenset(head[1:]))


def race_table(ran: Race) -> Table:
    from pliant.reports.tables import Table

    head = ["", "steps", "ms a step", "loss", "below standard", ""]
    cells = []
    for run in ran.runs:
        gain = ran.gain(run)
        band = f"{gain.value:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}]"
        cells.append(
            [
                run.name,
                f"{run.steps:,}",
                f"{1000 * run.seconds_a_step:.1f}",
                f"{ran.loss(run):.4f}",
                "-" if run is ran.standard else band,
                "recommended" if run is ran.winner else "",
            ]
        )
    title = f"A race at {ran.budget}"
    return Table(title, head, cells, right=frozenset(head[1:5]), colours={"recommended": "green"})


def race_picture(ran: Race) -> str:
    from pliant.reports import plots

    lines = {}
    for run in ran.runs:
        banded = len(ran.runs) <= 3 or run in (ran.runs[0], ran.standard)
        heights = list(zip(*([y for _, y in curve] for curve in run.curves), strict=True))
        lines[run.name] = plots.Line(
            [100 * x for x, _ in run.curves[0]],
            [sum(ys) / len(ys) for ys in heights],
            [min(ys) for ys in heights] if banded else None,
            [max(ys) for ys in heights] if banded else None,
            faint=run is ran.standard,
        )
    return plots.bands(lines, "share of the budget, %", "loss")
