"""The demo's third chapter: the small model learns something new in three ways, at equal cost.

The cost is counted in operations, so that the verdict does not depend on the machine or its load.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pliant import nano
from pliant.cli.demo.size import Size
from pliant.cli.demo.two_models import SMALL
from pliant.cli.gradients.audit import RACE_CAPTION, race_picture, race_table
from pliant.cli.gradients.show import coloured
from pliant.cli.terminal import track
from pliant.data.collate import Collator
from pliant.gradients import GradientConfig
from pliant.gradients.audit import Contender, Race, race, show
from pliant.reports.page import Coloured, KeyFigure, Section
from pliant.training.texts import Piece, texts

FAMILY = "shift"  # unseen by the models: each letter of a word becomes the next one
TRAINING, TEST, SHOWN = 2_000, 200, 3
BATCH, RATE, SEEDS, TURNS = 32, 3e-3, 3, 5
CONFIG = GradientConfig()


@dataclass(frozen=True)
class Tokens:
    """The results of the chapter."""

    race: Race
    coloured: tuple[Coloured, ...]
    """Some of the training texts, and the tokens that the default trains at first."""


def measure(size: Size) -> Tokens:
    """Each way starts from the same embedded model and gets the same operations per seed."""
    model, tokenizer = nano.load(SMALL)
    training, test = _pieces("train", TRAINING, tokenizer), _pieces("test", TEST, tokenizer)
    padded = Collator.of(tokenizer)
    longest = sorted(training[:50], key=lambda piece: -len(piece["labels"]))[:SHOWN]
    raced = race(
        model,
        training,
        test,
        CONFIG,
        steps=size.race_steps,
        points=size.race_points,
        seeds=SEEDS,
        turns=TURNS,
        batch_size=BATCH,
        lr=RATE,
        collate=padded,
        contenders=_contenders(model, padded(training[:BATCH])),
        progress=track,
    )
    return Tokens(raced, tuple(coloured(show(model, padded(longest), CONFIG), tokenizer)))


def _contenders(model: Any, batch: dict[str, Any]) -> list[Contender]:
    """The default, and a batch of so few questions that a step costs the same."""
    from pliant.gradients.audit.audit import cost_share
    from pliant.gradients.audit.contenders import fewer_rows, restored

    with restored(model):
        share = cost_share(model, batch, CONFIG, None)
    fewer = [c for c in fewer_rows(CONFIG, share, BATCH) if c.kind == "rows"]
    return [Contender("tokens", CONFIG), *fewer]


def _pieces(split: str, number: int, tokenizer: Any) -> list[Piece]:
    rows = nano.conversations(split, number, families=[FAMILY])
    return texts(rows, tokenizer, 256).pieces


def figures(results: Tokens) -> list[KeyFigure]:
    """What selecting tokens gains; nothing if the race was too short to tell."""
    race = results.race
    if not race.is_conclusive:
        return []
    gain = race.gain(race.runs[0])
    note = f"nats a token on standard training, {gain.low:+.2f} to {gain.high:+.2f}"
    return [KeyFigure("selected tokens gain", f"{gain.value:+.2f}", note)]


def section(results: Tokens) -> Section:
    """The chapter as sentences, a table, a picture and coloured text."""
    race = results.race
    return Section(
        "Which tokens are worth a gradient?",
        sentences=_sentences(results),
        tables=(race_table(race),),
        pictures=[(race_picture(race), RACE_CAPTION)] if race.is_conclusive else [],
        texts=results.coloured,
    )


def _sentences(results: Tokens) -> tuple[str, ...]:
    race, selective = results.race, results.race.runs[0]
    assert selective.operations_a_step is not None
    time = selective.seconds_a_step / race.standard.seconds_a_step
    return (
        f"{SMALL} learns a new kind of question (the next letter of each letter of a word) in "
        f"three ways, {SEEDS} times each, with the operations of {race.steps} standard steps: on "
        f"every token of every answer; on {CONFIG.ratio:.0%} of each answer's tokens, sampled and "
        "weighted by their gradients, with a backward pass through these alone; and on fewer "
        "questions per step.",
        race.sentence,
        f"A step on the sampled tokens has {selective.operations_a_step:.0%} of a standard step's "
        f"operations and took {time:.0%} of its time: in a model this small much of a step is "
        "overhead. `pliant gradients audit` measures this on your own model and data.",
    )
