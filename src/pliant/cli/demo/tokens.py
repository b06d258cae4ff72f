"""The demo's third chapter: the small model is taught something new in three ways, to the clock."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pliant import nano
from pliant.cli.demo.two_models import SMALL
from pliant.cli.gradients.report import RACE_CAPTION, race_picture, race_table
from pliant.cli.gradients.show import coloured
from pliant.cli.terminal import track
from pliant.data.collate import Collator
from pliant.gradients import GradientConfig
from pliant.gradients.audit import Contender, Race, race, show
from pliant.reports.coloured import Coloured
from pliant.reports.page import Section
from pliant.training.texts import Piece, texts

FAMILY = "shift"  # unseen by the models: each letter of a word becomes the next one
LESSONS, EXAM, SHOWN = 2_000, 200, 3
BATCH, RATE, SEEDS = 32, 3e-3, 3
CONFIG = GradientConfig()


@dataclass(frozen=True)
class Tokens:
    """What the chapter found."""

    race: Race
    coloured: tuple[Coloured, ...]
    """Some of the lessons, and what the default would train of them before the race."""


def measure(seconds: float) -> Tokens:
    """Each trains for `seconds`, once a seed, from the same embedded model."""
    model, tokenizer = nano.load(SMALL)
    lessons, exam = _pieces("train", LESSONS, tokenizer), _pieces("test", EXAM, tokenizer)
    padded = Collator.of(tokenizer)
    some = sorted(lessons[:50], key=lambda piece: -len(piece["labels"]))[:SHOWN]
    ran = race(
        model,
        lessons,
        exam,
        CONFIG,
        seconds=seconds,
        seeds=SEEDS,
        batch_size=BATCH,
        lr=RATE,
        collate=padded,
        contenders=_contenders(model, padded(lessons[:BATCH])),
        progress=track,
    )
    return Tokens(ran, tuple(coloured(show(model, padded(some), CONFIG), tokenizer)))


def _contenders(model: Any, batch: dict[str, Any]) -> list[Contender]:
    """The default, and a batch of so few questions that a step costs the same."""
    from pliant.gradients.audit.audit import cost_share
    from pliant.gradients.audit.contenders import fewer_rows
    from pliant.gradients.audit.snapshot import restored

    with restored(model):
        share = cost_share(model, batch, CONFIG, None)
    fewer = [one for one in fewer_rows(CONFIG, share, BATCH) if one.kind == "rows"]
    return [Contender("tokens", CONFIG), *fewer]


def _pieces(split: str, number: int, tokenizer: Any) -> list[Piece]:
    rows = nano.conversations(split, number, families=[FAMILY])
    return texts(rows, tokenizer, 256).pieces


def section(found: Tokens) -> Section:
    """The chapter as sentences, a table, a picture and coloured text."""
    return Section(
        "Which tokens are worth a gradient?",
        sentences=_sentences(found),
        tables=(race_table(found.race),),
        pictures=((race_picture(found.race), RACE_CAPTION),),
        texts=found.coloured,
    )


def _sentences(found: Tokens) -> tuple[str, ...]:
    ran, asked = found.race, found.race.runs[0]
    assert asked.operations_a_step is not None
    time = asked.seconds_a_step / ran.standard.seconds_a_step
    return (
        f"{SMALL} learns a family of questions that it has never seen (the next letter of each of "
        f"a word), for {ran.seconds:g} s, {SEEDS} times in each of three ways: with every token of "
        f"every answer; with {CONFIG.ratio:.0%} of each answer's tokens, drawn and weighed by how "
        "much they have to teach, and only these run backward; and with fewer questions a step, so "
        "many that it costs as many operations.",
        ran.sentence,
        f"A step on the drawn tokens has {asked.operations_a_step:.0%} of a standard step's "
        f"operations and took {time:.0%} of its time: in a model this small much of a step is "
        "overhead. What it comes to on a model and data of yours, `pliant gradients audit` tells.",
    )
