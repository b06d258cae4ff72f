"""`pliant gradients audit`: selective training beside its controls, on your own model and data."""

from __future__ import annotations

from typing import Annotated

import typer

from pliant.cli import terminal
from pliant.cli.gradient_commands import options
from pliant.cli.gradient_commands.lessons import config_of, open_lessons, quietly, say
from pliant.cli.gradient_commands.report import sections
from pliant.errors import InvalidInput

EXAMPLE = "pliant gradients audit --model nano-s --data nano --ratio 0.25"


def audit(
    model: options.Model,
    data: options.Data,
    engine: options.Engine = "sparse",
    ratio: options.Ratio = 0.25,
    selection: options.Selection = None,
    score: options.Score = None,
    choose: options.Choose = None,
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
    length: options.Length = 256,
    rows: options.Rows = None,
    subset: options.Subset = None,
    lora: options.Lora = None,
    seed: Annotated[int, typer.Option(help="Which pieces go where.")] = 0,
    dtype: options.Dtype = "float32",
    device: options.Device = None,
    page: options.Page = None,
    json: options.Json = False,
) -> None:
    """Compare selective training with its controls: single steps, and then a short race.

    The race trains all of them from the model's weights, each for the same time (or operations),
    and measures them on pieces of the data that none was trained on. Nothing is saved.
    """
    from pliant.reports.page import make_room, write

    config = config_of(engine, ratio, selection, score, choose)
    if seconds is not None and steps is not None:
        raise InvalidInput("--seconds and --steps: the race has one budget, give one")
    if seconds is not None and not 0 < seconds < float("inf"):
        raise InvalidInput(f"--seconds {seconds:g}: give each contender some time, above 0")
    if lr == float("inf"):
        raise InvalidInput("--lr inf: give a number")
    if page is not None:
        make_room(page)
    with quietly():
        from pliant.gradients.audit import audit as compared
        from pliant.gradients.audit import race as raced
        from pliant.gradients.runs.texts import Padded
        from pliant.training.stock_model import with_lora

        found = open_lessons(
            model, data, length, rows=rows, subset=subset, dtype=dtype, device=device, seed=seed
        )
        least = 2 if race else 1
        if len(found.pieces) < least:
            raise InvalidInput(f"{data}: makes {len(found.pieces)} pieces, and {least} are needed")
        trained = found.model if lora is None else with_lora(found.model, lora, seed)
        measured = compared(
            trained,
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
                trained,
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
