"""`pliant gradients show`: texts, coloured by what would be trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from pliant.cli import terminal
from pliant.cli.gradient_commands import options
from pliant.cli.gradient_commands.lessons import config_of, open_lessons, quietly, say

if TYPE_CHECKING:
    from pliant.gradients.audit.shown import Shown, ShownToken
    from pliant.reports.coloured import Coloured, Word

EXAMPLE = "pliant gradients show --model nano-s --data nano --ratio 0.25"


def show(
    model: options.Model,
    data: options.Data,
    engine: options.Engine = "sparse",
    ratio: options.Ratio = 0.25,
    selection: options.Selection = None,
    score: options.Score = None,
    choose: options.Choose = None,
    texts: Annotated[int, typer.Option(help="How many texts.", min=1)] = 4,
    length: options.Length = 256,
    rows: options.Rows = None,
    subset: options.Subset = None,
    seed: Annotated[int, typer.Option(help="Which texts, and which draw.")] = 0,
    dtype: options.Dtype = "float32",
    device: options.Device = None,
    page: options.Page = None,
    json: options.Json = False,
) -> None:
    """Colour texts by what would be trained: the stronger, the higher the loss of the token.

    In a pipe, what would be trained stands in brackets.
    """
    from dataclasses import replace

    from pliant.reports.page import Section, make_room, write

    config = config_of(engine, ratio, selection, score, choose)
    if page is not None:
        make_room(page)
    with quietly():
        from pliant.gradients.audit import show as shown_by

        found = open_lessons(
            model, data, length, rows=rows, subset=subset, dtype=dtype, device=device, seed=seed
        )
        (batch,) = found.batches(texts, 1)
        shown = shown_by(found.model, batch, replace(config, seed=config.seed + seed))
    if json:
        terminal.print_json({"texts": plain(shown, found.tokenizer)})
    drawn = coloured(shown, found.tokenizer)
    if not json:
        for text in drawn:
            text.draw(terminal.console())
    if page is not None:
        section = Section("What would be trained", [LEGEND], texts=drawn)
        where = write(page, f"{model} on {data}: which tokens train", [section])
        if not json:
            say(f"The same as a page: {where}")


LEGEND = (
    "Coloured is what would be trained: the stronger, the higher its loss. Grey is not to be "
    "learned at all: a prompt, and a text's first token. Rest the pointer on a token to see its "
    "loss and its weight."
)


def coloured(shown: Shown, tokenizer: Any) -> list[Coloured]:
    from pliant.reports.coloured import Coloured

    highest = max((token.loss or 0.0 for row in shown for token in row), default=0.0) or 1.0
    texts = []
    for i, row in enumerate(shown, start=1):
        labelled, trained = (
            sum(x) for x in zip(*((t.labelled, t.trained) for t in row), strict=True)
        )
        title = f"Text {i}: {trained} of {labelled} tokens would be trained"
        texts.append(Coloured(title, [_word(token, tokenizer, highest) for token in row]))
    return texts


def _word(token: ShownToken, tokenizer: Any, highest: float) -> Word:
    from pliant.reports.coloured import Word

    text = tokenizer.decode([token.id])
    if not token.labelled:
        return Word(text, "faint")
    loss = "" if token.loss is None else f"loss {token.loss:.2f}"
    if not token.trained:
        return Word(text, "plain", says=f"{loss}, not trained" if loss else "not trained")
    strength = 0.5 if token.loss is None else (token.loss / highest) ** 0.5
    return Word(text, "marked", strength, f"{loss}, weight {token.weight:.2f}")


def plain(shown: Shown, tokenizer: Any) -> list[list[dict[str, Any]]]:
    """For machines."""
    return [
        [
            {
                "text": tokenizer.decode([token.id]),
                "labelled": token.labelled,
                "trained": token.trained,
                "weight": token.weight,
                "loss": token.loss,
            }
            for token in row
        ]
        for row in shown
    ]
