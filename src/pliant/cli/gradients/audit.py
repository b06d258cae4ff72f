"""`pliant gradients audit`: selective training beside its controls, on your own model and data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge

from pliant.cli import terminal
from pliant.cli.gradients.inputs import Inputs, SelectiveOptions, load_inputs, quiet_libraries
from pliant.cli.shared_options import DeviceOptions, Engine
from pliant.errors import InvalidInput

if TYPE_CHECKING:
    from pliant.gradients.audit import Audit, Race
    from pliant.gradients.config import GradientConfig
    from pliant.reports.page import Section, Top
    from pliant.reports.tables import Table

SECONDS = 20.0


@dataclass(frozen=True, kw_only=True)
class AuditOptions(SelectiveOptions, DeviceOptions):
    engine: Engine = "sparse"
    """How the selected tokens are trained."""
    batch_size: Annotated[int, Ge(1)] = 8
    """Sequences per batch."""
    batches: Annotated[int, Ge(1)] = 4
    """How many batches the gradients are compared on."""
    draws: Annotated[int, Ge(2)] = 16
    """Draws per batch of each rule that samples."""
    turns: Annotated[int, Ge(1)] = 9
    """How often each step is timed."""
    seconds: Annotated[float, Ge(0)] | None = None
    """The race's budget for each contender. Default: 20, if --steps is not given either."""
    steps: Annotated[int, Ge(1)] | None = None
    """The race's budget instead: the operations of this many standard steps. Default: seconds."""
    race: bool = True
    """Race the contenders; with --no-race, only compare single steps."""
    seeds: Annotated[int, Ge(1)] = 3
    """Seeds of the race."""
    lr: Annotated[float, Ge(0)] = 1e-4
    """The race's learning rate."""
    held_out: Annotated[int, Ge(1)] = 64
    """Pieces held out to measure the race on."""
    lora: Annotated[int, Ge(1)] | None = None
    """Train low-rank matrices of this rank only. Default: all weights."""
    seed: int = 0
    """Shuffles the pieces."""
    page: Path | None = None
    """Also write an HTML page here. Default: none."""
    json: bool = False
    """Print one JSON document."""

    def __post_init__(self) -> None:
        if self.seconds is not None and self.steps is not None:
            raise InvalidInput("--seconds and --steps: the race has one budget, give one")
        if self.seconds is not None and not 0 < self.seconds < math.inf:
            raise InvalidInput(f"--seconds {self.seconds:g}: give each contender some time")
        if self.lr == math.inf:
            raise InvalidInput("--lr inf: give a finite number")


def audit(options: AuditOptions) -> None:
    """Compare selective training with its controls: single steps, then a short race.

    The race trains every contender from the model's weights, for the same time or operations, and
    measures them on held-out pieces of the data. Nothing is saved.

    Example: pliant gradients audit --model nano-s --data nano --ratio 0.25
    """
    from pliant.reports.page import check_writable, write

    config = options.config()
    if options.page is not None:
        check_writable(options.page)
    with quiet_libraries():
        audited, raced = measure(
            options, load_inputs(options, options.device, options.seed), config
        )
    drawn = sections(audited, raced)
    page = None
    if options.page is not None:
        title = f"{options.model} on {options.data}: which tokens should train?"
        page = write(options.page, title, drawn, _top(options, audited, raced))
    if options.json:
        race = None if raced is None else raced.as_dict()
        terminal.print_json({"audit": audited.as_dict(), "race": race})
        return
    for section in drawn:
        terminal.draw(section.tables, section.sentences)
    if page is not None:
        terminal.print_text(f"The same as a page: {page}")


def measure(
    options: AuditOptions, inputs: Inputs, config: GradientConfig
) -> tuple[Audit, Race | None]:
    from pliant.data.collate import Collator
    from pliant.gradients.audit import audit as audit_steps
    from pliant.gradients.audit import race as run_race
    from pliant.training.run import with_lora

    pieces, needed = inputs.pieces, 2 if options.race else 1
    if len(pieces) < needed:
        raise InvalidInput(f"{options.data}: only {len(pieces)} pieces; {needed} are needed")
    model = inputs.model
    if options.lora is not None:
        model = with_lora(model, options.lora, options.seed)
    audited = audit_steps(
        model,
        inputs.batches(options.batch_size, options.batches),
        config,
        draws=options.draws,
        turns=options.turns,
        progress=terminal.track,
    )
    if not options.race:
        return audited, None
    held_out = min(options.held_out, len(pieces) // 4 or 1)
    raced = run_race(
        model,
        pieces[held_out:],
        pieces[:held_out],
        config,
        seconds=(options.seconds or SECONDS) if options.steps is None else None,
        steps=options.steps,
        seeds=options.seeds,
        batch_size=options.batch_size,
        lr=options.lr,
        collate=Collator.of(inputs.tokenizer),
        turns=options.turns,
        progress=terminal.track,
    )
    return audited, raced


# --- an audit and a race as sentences, tables and a picture --------------------------------------


def _top(options: AuditOptions, audit: Audit, race: Race | None) -> Top:
    """What to train on, from the race; without one there is no verdict."""
    from pliant.reports.page import KeyFigure, Top, Verdict

    ours = audit.findings[0]
    figures = [
        KeyFigure("speed of a step", f"{ours.cost.speed.value:.2f}x", "of training every token"),
        KeyFigure("peak memory", f"{audit.memory(ours):.0%}", "of training every token"),
    ]
    if race is None:
        return Top(None, figures, options.seed)
    if not race.is_conclusive:
        return Top(Verdict("mixed", race.sentence, ""), figures, options.seed)
    run, gain = race.runs[0], race.gain(race.runs[0])
    note = f"interval {gain.low:+.3f} to {gain.high:+.3f}; above 0 is better"
    figures.append(KeyFigure("gain on standard", f"{gain.value:+.3f}", note))
    figures.append(KeyFigure("held-out loss", f"{race.loss(run):.3f}", run.name))
    pays = race.winner is not race.standard
    action = f"Train: pliant train lm --model {options.model} --data {options.data} --out FOLDER."
    return Top(Verdict("good" if pays else "mixed", race.sentence, action), figures, options.seed)


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
        pictures=[(race_picture(race), RACE_CAPTION)] if race.is_conclusive else [],
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
        if race.seeds == 1:
            band = f"{gain.value:+.4f} (one seed)"
        cells.append(
            [
                run.name,
                f"{run.steps:,}",
                f"{1000 * run.seconds_a_step:.1f}",
                f"{race.loss(run):.4f}" if race.is_conclusive else "-",
                "-" if run is race.standard or not race.is_conclusive else band,
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
            role="control" if run is race.standard else "ours" if run is race.runs[0] else "rival",
        )
    return plots.lines(lines, "share of the budget, %", "loss")
