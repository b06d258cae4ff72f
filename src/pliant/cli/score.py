"""`pliant score SCORER`: how hard prompts are, as a saved scorer or router sees it."""

from __future__ import annotations

import json as encoder
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pliant.cli import terminal
from pliant.errors import InvalidInput

if TYPE_CHECKING:
    from pliant.complexity.scores import Scores
    from pliant.reports.tables import Table
    from pliant.routing.scorers import Predictions

EXAMPLE = 'pliant score my-scorer "What is 2 + 2?" "Prove it."'
SHOWN = 60  # characters of a prompt in the table
TEXT = (".txt", ".text", "")
Row = dict[str, Any]


def score(
    scorer: Annotated[
        str, typer.Argument(help="A saved scorer (a folder, or on the hub), or a router's folder.")
    ],
    prompts: Annotated[
        list[str] | None, typer.Argument(help="Left out, or -: one on each line of stdin.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(help="Prompts: .txt with one on each line, or JSONL, CSV, parquet."),
    ] = None,
    column: Annotated[
        str, typer.Option(help="Of the file: a text, or a list of messages.")
    ] = "prompt",
    chat: Annotated[
        bool, typer.Option("--chat", help="A text is what a user said: through the chat template.")
    ] = False,
    base: Annotated[
        str | None, typer.Option(help="The scorer's base, if it does not name it: a folder, say.")
    ] = None,
    truncation: Annotated[
        str | None,
        typer.Option(help="left or right: take that end off a prompt that is too long."),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Prompts at a time; left out, what fits well.", min=1)
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="The base's; left out, as it is saved.")] = None,
    device: Annotated[str | None, typer.Option(help="Where the base runs: cpu, cuda, ...")] = None,
    json: Annotated[
        bool, typer.Option("--json", help="One JSON object a line and prompt.")
    ] = False,
) -> None:
    """Say how hard prompts are: score is the probability that the model fails.

    With a gain, that is how much more often the strong model would be right.
    """
    asked = read_prompts(prompts or [], file, column)
    options = {"chat": chat, "truncation": truncation, "batch_size": batch_size}
    place = {"base": base, "dtype": dtype, "device": device}
    rows = scored(scorer, asked, options, {k: v for k, v in place.items() if v is not None})
    if json:
        for row in rows:
            print(encoder.dumps(row, ensure_ascii=False, allow_nan=False))
    else:
        table(scorer, rows).draw(terminal.console())


def scored(
    name: str, prompts: Sequence[Any], options: dict[str, Any], place: dict[str, Any]
) -> list[Row]:
    """One row for each prompt, from whichever kind of folder the name leads to."""
    folder = Path(name).expanduser()
    routed = [kind for kind in ("router.json", "scorer.json") if (folder / kind).is_file()]
    if routed:
        given = [*place, *(key for key, value in options.items() if value)]
        if given:
            raise InvalidInput(
                f"--{given[0].replace('_', '-')} is settled in the router's folder: leave it out"
            )
        return _by_router(folder, routed[0], prompts)
    return _by_scorer(name, prompts, options, place)


def _by_scorer(
    name: str, prompts: Sequence[Any], options: dict[str, Any], place: dict[str, Any]
) -> list[Row]:
    _check_scorer(name)
    from pliant.complexity.facade.causal_lm import CPXCausalLM  # after what can fail at once

    model = CPXCausalLM.from_pretrained(name, **place)
    return list(_rows_of(prompts, model.score(prompts, **options)))


def _by_router(folder: Path, kind: str, prompts: Sequence[Any]) -> list[Row]:
    from pliant.routing import router_file, scorers
    from pliant.routing.fitting.evaluate import calibrated
    from pliant.routing.open import open_scorer

    if kind == "scorer.json":
        return list(_rows_predicted(prompts, scorers.load(folder).predict(prompts)))
    file = router_file.read(folder)
    found = open_scorer(folder, file).predict(prompts)
    # The router's own probabilities: what `route ask` says of the same prompt.
    return list(_rows_predicted(prompts, replace(found, right=calibrated(file, found))))


def _check_scorer(name: str) -> None:
    """A local folder that holds something else is said before torch is imported."""
    folder = Path(name).expanduser()
    local = folder.is_absolute() or name.startswith((".", "~")) or folder.exists()
    if not local:
        from pliant.loading import embedded

        if name in embedded():
            raise InvalidInput(f"{name!r} is a model and no scorer: train one on it first")
        return
    if not folder.is_dir():
        raise InvalidInput(f"{name!r}: no such folder")
    if not (folder / "pliant.json").is_file():
        raise InvalidInput(
            f"{name!r} holds no scorer (looked for pliant.json, router.json, scorer.json)"
        )


def _rows_of(prompts: Sequence[Any], scores: Scores) -> Iterator[Row]:
    hard, gain = _known(scores), scores.gain
    for i, prompt in enumerate(prompts):
        row: Row = {"prompt": prompt}
        if hard is not None:
            row["score"] = float(hard[i])
        if gain is not None:
            row["gain"] = float(gain[i])
        yield {**row, "outputs": {name: float(scores[name][i]) for name in scores.outputs}}


def _known(scores: Scores) -> Any:
    try:
        return scores.score
    except InvalidInput:  # its outputs are something else: domains, say
        return None


def _rows_predicted(prompts: Sequence[Any], found: Predictions) -> Iterator[Row]:
    for i, prompt in enumerate(prompts):
        row: Row = {"prompt": prompt}
        if found.right is not None:
            row["score"] = float(found.score[i])
        row["gain"] = float(found.last_gain[i])
        if found.novel is not None:
            row["novel"] = bool(found.novel[i])
        yield row


def table(name: str, rows: Sequence[Row]) -> Table:
    from pliant.reports.tables import Table

    figures = [key for key in ("score", "gain") if rows and key in rows[0]]
    others = [k for k in (rows[0].get("outputs", {}) if rows else {}) if k not in figures]
    notes = ["novel"] if rows and "novel" in rows[0] else []
    head = [*figures, *others, *notes, "prompt"]
    cells = [
        [
            *(f"{row[key]:.4f}" for key in figures),
            *(f"{row['outputs'][key]:.4f}" for key in others),
            *("yes" if row[key] else "" for key in notes),
            shown(row["prompt"]),
        ]
        for row in rows
    ]
    count = f"{len(rows):,} prompt{'s' if len(rows) != 1 else ''}"
    return Table(f"{name}: {count}", head, cells, right=frozenset([*figures, *others]))


def shown(prompt: Any) -> str:
    """One short line of a prompt; of a conversation, its last message."""
    text = prompt if isinstance(prompt, str) else str(prompt[-1].get("content", ""))
    line = " ".join(text.split())
    return line if len(line) <= SHOWN else line[: SHOWN - 3] + "..."


def read_prompts(given: Sequence[str], file: Path | None, column: str) -> list[Any]:
    """From the arguments, a file, or stdin: only one of them."""
    if given and file is not None:
        raise InvalidInput("prompts as arguments and --file: give one of the two")
    found: list[Any] = list(given)
    if file is not None:
        found = _from_file(file, column)
    elif not given or given == ["-"]:
        if sys.stdin.isatty() and not given:
            raise InvalidInput("no prompts: give them as arguments, with --file, or on stdin")
        found = _lines(sys.stdin.read())
    if not found:
        raise InvalidInput("there are no prompts in it")
    return found


def _from_file(file: Path, column: str) -> list[Any]:
    if file.suffix.lower() in TEXT:
        try:
            return _lines(file.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise InvalidInput(f"{file}: not text in UTF-8 ({error.reason})") from error
    from pliant.data import read_rows

    return [row[column] for row in read_rows(file, [column])]


def _lines(text: str) -> list[str]:
    return [line for line in text.split("\n") if line.strip()]
