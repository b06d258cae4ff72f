"""An audit and a race as sentences, tables and a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pliant.gradients.audit import Audit, Race
    from pliant.reports.page import Section
    from pliant.reports.tables import Table


def sections(audit: Audit, race: Race | None) -> list[Section]:
    from pliant.reports.page import Section

    notes = dict.fromkeys(note for finding in audit.findings for note in finding.notes)
    about = (
        f"On {audit.sequences} sequences with {audit.tokens:,} labelled tokens in "
        f"{audit.batches} batches; {audit.draws} draws of each rule that samples."
    )
    steps = Section(
        "One step of each", [audit.sentence, about, *READING, *notes], tables=[steps_table(audit)]
    )
    if race is None:
        return [steps]
    race_section = Section(
        "A race",
        [race.sentence],
        tables=[race_table(race)],
        pictures=[(race_picture(race), RACE_CAPTION)],
    )
    return [steps, race_section]


READING = (
    "Cosine and length compare a sampled gradient with the full gradient of the same batch; bias "
    "is the length of the mean error and variance its spread, as shares of the full gradient's "
    "(squared) length. Speed is the time of a standard step divided by the time of this one; "
    "memory is the peak beyond the weights; operations are counted.",
)
RACE_CAPTION = (
    "Loss on held-out pieces during the race: the mean over the seeds; shading shows their range."
)


def steps_table(audit: Audit) -> Table:
    from pliant.reports.tables import Table

    head = ["", "cosine", "length", "bias", "variance", "ms", "speed", "memory", "operations"]
    cells = []
    for finding in audit.findings:
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
                f"{audit.memory(finding):.2f}",
                "-" if cost.operations is None else f"{cost.operations:.2f}",
            ]
        )
    return Table("A step of each", head, cells, right=frozenset(head[1:]))


def race_table(race: Race) -> Table:
    from pliant.reports.tables import Table

    head = ["", "steps", "ms a step", "loss", "below standard", ""]
    cells = []
    for run in race.runs:
        gain = race.gain(run)
        band = f"{gain.value:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}]"
        cells.append(
            [
                run.name,
                f"{run.steps:,}",
                f"{1000 * run.seconds_a_step:.1f}",
                f"{race.loss(run):.4f}",
                "-" if run is race.standard else band,
                "recommended" if race.is_conclusive and run is race.winner else "",
            ]
        )
    title = f"A race at {race.budget}"
    return Table(title, head, cells, right=frozenset(head[1:5]), colours={"recommended": "green"})


def race_picture(race: Race) -> str:
    from pliant.reports import plots

    lines = {}
    for run in race.runs:
        banded = len(race.runs) <= 3 or run in (race.runs[0], race.standard)
        heights = list(zip(*([y for _, y in curve] for curve in run.curves), strict=True))
        lines[run.name] = plots.Line(
            [100 * x for x, _ in run.curves[0]],
            [sum(ys) / len(ys) for ys in heights],
            [min(ys) for ys in heights] if banded else None,
            [max(ys) for ys in heights] if banded else None,
            faint=run is race.standard,
        )
    return plots.bands(lines, "share of the budget, %", "loss")
