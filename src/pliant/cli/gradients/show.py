"""`pliant gradients show`: texts, coloured by the tokens that would be trained."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge

from pliant.cli import terminal
from pliant.cli.gradients.inputs import SelectiveOptions, load_inputs, quiet_libraries
from pliant.cli.shared_options import DeviceOptions, Engine

if TYPE_CHECKING:
    from pliant.gradients.audit.audit import Shown, ShownToken
    from pliant.reports.page import Coloured, Word


@dataclass(frozen=True, kw_only=True)
class ShowOptions(SelectiveOptions, DeviceOptions):
    engine: Engine = "sparse"
    """How the selected tokens are trained."""
    texts: Annotated[int, Ge(1)] = 4
    """How many texts."""
    seed: int = 0
    """Picks the texts, and the draw of tokens."""
    page: Path | None = None
    """Also write an HTML page here. Default: none."""
    json: bool = False
    """Print one JSON document."""


def show(options: ShowOptions) -> None:
    """Colour texts by the tokens that would be trained: the higher a token's loss, the stronger.

    In a pipe, brackets mark those tokens.

    Example: pliant gradients show --model nano-s --data nano --ratio 0.25
    """
    from pliant.reports.page import Section, check_writable, write

    config = options.config()
    if options.page is not None:
        check_writable(options.page)
    with quiet_libraries():
        from pliant.gradients.audit import show as tokens_of

        inputs = load_inputs(options, options.device, options.seed)
        (batch,) = inputs.batches(options.texts, 1)
        tokens = tokens_of(inputs.model, batch, replace(config, seed=config.seed + options.seed))
    texts = coloured(tokens, inputs.tokenizer)
    if options.json:
        terminal.print_json({"texts": plain(tokens, inputs.tokenizer)})
    else:
        terminal.draw((), texts=texts)
    if options.page is not None:
        section = Section("What would be trained", [LEGEND], texts=texts)
        title = f"{options.model} on {options.data}: which tokens train"
        path = write(options.page, title, [section])
        if not options.json:
            terminal.print_text(f"The same as a page: {path}")


LEGEND = (
    "Coloured tokens would be trained: the stronger the colour, the higher the loss. Grey tokens "
    "have no label: a prompt, and a text's first token. Hover over a token to see its loss and its "
    "weight."
)


def coloured(shown: Shown, tokenizer: Any) -> list[Coloured]:
    from pliant.reports.page import Coloured

    highest = max((token.loss or 0.0 for row in shown for token in row), default=0.0) or 1.0
    texts = []
    for i, row in enumerate(shown, start=1):
        trained, labelled = sum(t.trained for t in row), sum(t.labelled for t in row)
        title = f"Text {i}: {trained} of {labelled} tokens would be trained"
        texts.append(Coloured(title, [_word(token, tokenizer, highest) for token in row]))
    return texts


def _word(token: ShownToken, tokenizer: Any, highest: float) -> Word:
    from pliant.reports.page import Word

    text = tokenizer.decode([token.id])
    if not token.labelled:
        return Word(text, "faint")
    loss = "" if token.loss is None else f"loss {token.loss:.2f}"
    if not token.trained:
        return Word(text, "plain", tooltip=f"{loss}, not trained" if loss else "not trained")
    strength = 0.5 if token.loss is None else (token.loss / highest) ** 0.5
    return Word(text, "marked", strength, f"{loss}, weight {token.weight:.2f}")


def plain(shown: Shown, tokenizer: Any) -> list[list[dict[str, Any]]]:
    """The same for JSON."""
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
