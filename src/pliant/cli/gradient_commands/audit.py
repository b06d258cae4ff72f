"""`pliant gradients audit`: selective training beside its controls, on your own model and data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pliant.cli import terminal
from pliant.cli.gradient_commands.lessons import DATA, config_of, open_lessons, quietly, say
from pliant.errors import InvalidInput

if TYPE_CHECKING:
    from pliant.gradients.audit import Audit, Race
    from pliant.reports.page import Section
    from pliant.reports.tables import Table

EXAMPLE = "pliant gradients audit --model nano-s --data nano --ratio 0.25"


def audit(
    model: Annotated[str, typer.Option(help="nano-s, nano-l, a folder, or a name on the hub.")],
    data: Annotated[str, typer.Option(help=DATA)],
    engine: Annotated[str, typer.Option(help="sparse, exact or completion.")] = "sparse",
    ratio: Annotated[
        float, typer.Option(help="The share of a row's tokens that is trained.")
    ] = 0.25,
    selection: Annotated[
        str | None, typer.Option(help="How they are chosen: sampled, uniform, topk, ...")
    ] = None,
    score: Annotated[
        str | None, typer.Option(help="By what: gradient, loss, entropy, margin, ...")
    ] = None,
    choose: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Any other setting of GradientConfig; repeatable."),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences a batch.", min=1)] = 8,
    batches: Annotated[int, typer.Option(help="On which gradients are compared.", min=1)] = 4,
    draws: Annotated[int, typer.Option(help="Of each rule that draws, a batch.", min=2)] = 16,
    turns: Annotated[int, typer.Option(help="How often each one's step is timed.", min=1)] = 9,
    seconds: Annotated[
        float | None, typer.Option(help="The race: so long for each, 20 if not said.", min=0)
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(help="The race: instead, the operations of so many standard steps.", min=1),
    ] = None,
    race: Annotated[bool, typer.Option(help="Or --no-race: compare single steps only.")] = True,
    seeds: Annotated[int, typer.Option(help="Of the race.", min=1)] = 3,
    lr: Annotated[float, typer.Option(help="The race's learning rate.", min=0)] = 1e-4,
    held_out: Annotated[
        int, typer.Option(help="Pieces that the race is measured on, and not trained.", min=1)
    ] = 64,
    length: Annotated[int, typer.Option(help="Tokens of a piece of text, at most.", min=2)] = 256,
    rows: Annotated[int | None, typer.Option(help="Read only so many rows.", min=1)] = None,
    subset: Annotated[str | None, typer.Option(help="Of a data set on the hub.")] = None,
    seed: Annotated[int, typer.Option(help="Which pieces go where.")] = 0,
    dtype: Annotated[str, typer.Option(help="What the weights are trained in.")] = "float32",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
    page: Annotated[
        Path | None, typer.Option(help="Write an HTML page, too.", dir_okay=False)
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Compare selective training with its controls: single steps, and then a short race.

    The race trains all of them from the model's weights, each for the same time (or operations),
    and measures them on pieces of the data that none was trained on. Nothing is saved.
    """
    from pliant.reports.page import make_room, write

    config = config_of(engine, ratio, selection, score, choose)
    if seconds is not None and steps is not None:
        raise InvalidInput("--seconds and --steps: the race has one budget, give one")
    if page is not None:
        make_room(page)
    with quietly():
        from pliant.gradients.audit import audit as compared
        from pliant.gradients.audit import race as raced
        from pliant.gradients.texts import Padded

        found = open_lessons(
            model, data, length, rows=rows, subset=subset, dtype=dtype, device=device, seed=seed
        )
        least = 2 if race else 1
        if len(found.pieces) < least:
            raise InvalidInput(f"{data}: makes {len(found.pieces)} pieces, and {least} are needed")
        measured = compared(
            found.model,
            found.batches(batch_size, batches),
            config,
            draws=draws,
            turns=turns,
            progress=terminal.track,
        )
        held = min(held_out, len(found.pieces) // 4 or 1)
        ran = None
        if race:
            ran = raced(
                found.model,
                found.pieces[held:],
                found.pieces[:held],
                config,
                seconds=(20.0 if seconds is None else seconds) if steps is None else None,
                steps=steps,
                seeds=seeds,
                batch_size=batch_size,
                lr=lr,
                collate=Padded(found.tokenizer),
                turns=turns,
                progress=terminal.track,
            )
    drawn = sections(measured, ran)
    where = None
    if page is not None:
        where = write(page, f"{model} on {data}: which tokens should train?", drawn)
    if json:
        terminal.print_json(
            {"audit": measured.as_dict(), "race": None if ran is None else ran.as_dict()}
        )
        return
    for section in drawn:
        for table in section.tables:
            table.draw(terminal.console())
        for sentence in section.sentences:
            say(sentence)
    if where is not None:
        say(f"The same as a page: {where}")


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
    "Loss on held-out pieces over the race: the mean of the seeds; for what was asked for, and for "
    "standard training, also the limits between which they lie."
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
        banded = run in (ran.runs[0], ran.standard)
        heights = list(zip(*([y for _, y in curve] for curve in run.curves), strict=True))
        lines[run.name] = plots.Line(
            [100 * x for x, _ in run.curves[0]],
            [sum(ys) / len(ys) for ys in heights],
            [min(ys) for ys in heights] if banded else None,
            [max(ys) for ys in heights] if banded else None,
            faint=run is ran.standard,
        )
    return plots.bands(lines, "share of the budget, %", "loss")
