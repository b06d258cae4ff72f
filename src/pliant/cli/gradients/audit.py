"""`pliant gradients audit`: selective training beside its controls, on your own model and data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge

from pliant.cli import terminal
from pliant.cli.gradients.inputs import Inputs, load_inputs, quiet_libraries
from pliant.cli.gradients.options import SelectiveOptions
from pliant.cli.gradients.report import sections
from pliant.errors import InvalidInput

if TYPE_CHECKING:
    from pliant.gradients.audit import Audit, Race
    from pliant.gradients.config import GradientConfig

EXAMPLE = "pliant gradients audit --model nano-s --data nano --ratio 0.25"
SECONDS = 20.0


@dataclass(frozen=True, kw_only=True)
class AuditOptions(SelectiveOptions):
    batch_size: Annotated[int, Ge(1)] = 8
    """Sequences per batch."""
    batches: Annotated[int, Ge(1)] = 4
    """How many batches the gradients are compared on."""
    draws: Annotated[int, Ge(2)] = 16
    """Draws per batch of each rule that samples."""
    turns: Annotated[int, Ge(1)] = 9
    """How often each step is timed."""
    seconds: Annotated[float, Ge(0)] | None = None
    """The race's budget for each contender; 20 if neither this nor --steps is given."""
    steps: Annotated[int, Ge(1)] | None = None
    """The race's budget instead: the operations of this many standard steps."""
    race: bool = True
    """Race the contenders; with --no-race, only compare single steps."""
    seeds: Annotated[int, Ge(1)] = 3
    """Seeds of the race."""
    lr: Annotated[float, Ge(0)] = 1e-4
    """The race's learning rate."""
    held_out: Annotated[int, Ge(1)] = 64
    """Pieces held out to measure the race on."""
    lora: Annotated[int, Ge(1)] | None = None
    """Train low-rank matrices of this rank only."""
    seed: int = 0
    """Shuffles the pieces."""
    device: str | None = None
    """cpu, cuda, ..."""
    page: Path | None = None
    """Also write an HTML page here."""
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
        page = write(options.page, title, drawn)
    if options.json:
        race = None if raced is None else raced.as_dict()
        terminal.print_json({"audit": audited.as_dict(), "race": race})
        return
    for section in drawn:
        for table in section.tables:
            table.draw(terminal.console())
        for sentence in section.sentences:
            terminal.print_text(sentence)
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
