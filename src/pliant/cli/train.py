"""`pliant train`: train on the tokens that are worth it, in a folder that survives a kill."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pliant.cli import terminal
from pliant.cli.gradient_commands import options
from pliant.errors import InvalidInput

if TYPE_CHECKING:
    from pliant.gradients.runs.run import Ended
    from pliant.reports.tables import Table

EXAMPLE = "pliant train --model nano-s --data notes.txt --out mine --engine sparse --ratio 0.25"
EMBEDDED = "nano"
QUESTIONS = 1000


def train(
    model: options.Model,
    data: options.Data,
    out: Annotated[Path, typer.Option(help="The run's folder; in the end it is the model.")],
    engine: options.Engine = "sparse",
    ratio: options.Ratio = 0.25,
    selection: options.Selection = None,
    score: options.Score = None,
    choose: options.Choose = None,
    set: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Any of TrainingArguments; repeatable."),
    ] = None,
    evaluate: Annotated[
        str | None, typer.Option(help="Data like the above: its loss is measured at the end.")
    ] = None,
    length: options.Length = 512,
    rows: options.Rows = None,
    subset: options.Subset = None,
    lora: options.Lora = None,
    dtype: options.Dtype = "float32",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the run's last whole checkpoint.")
    ] = False,
    json: options.Json = False,
) -> None:
    """Train a model on the tokens of each batch that are worth a gradient.

    Killed at any moment, the run loses nothing but the steps since its last checkpoint: the same
    command with --resume goes on there, and comes to the same losses.
    """
    from dataclasses import asdict

    from pliant.gradients.runs import run, settings, texts

    config = settings.gradient_config(
        settings.pairs(choose or [], "--choose"),
        engine=engine,
        ratio=ratio,
        selection=selection,
        score=score,
    )
    if config.needs_scores and config.score == "excess":
        raise InvalidInput(
            "score = 'excess' compares with a reference, which Python alone can give"
        )
    given = settings.pairs(set or [], "--set")
    settings.arguments(out, given)  # what is wrong with them is said before anything is loaded
    lessons = texts.read(data, subset=subset, limit=rows) if data != EMBEDDED else _questions(rows)
    from pliant.loading import load

    loaded, tokenizer = load(model, dtype=dtype)
    made = texts.texts(lessons, tokenizer, _within(length, loaded.config))
    held = None
    if evaluate is not None:
        others = _questions(rows, "dev") if evaluate == EMBEDDED else texts.read(evaluate)
        held = texts.texts(others, tokenizer, _within(length, loaded.config))
    if made.left_out:
        _say(f"{made.left_out} rows are left out: their completion begins beyond --length {length}")
    plan = run.Plan.of(model, data, made, config, given, lora, dtype)
    with _notes():
        ended = run.run(
            loaded, tokenizer, made, out, plan, evaluation=held, resume=resume, say=_say
        )
    if json:
        terminal.print_json({"out": str(out), **asdict(ended)})
    else:
        table(out, ended).draw(terminal.console())


def table(out: Path, ended: Ended) -> Table:
    from pliant.reports.tables import Table, count

    cells = [
        [
            "steps",
            f"{ended.steps}" + (f" (from {ended.resumed_at} on)" if ended.resumed_at else ""),
        ],
        ["engine", ended.engine],
        ["loss at first", f"{ended.first_loss:.4f}"],
        ["loss at last", f"{ended.last_loss:.4f}"],
        ["tokens", count(ended.tokens)],
        [
            "of these trained",
            f"{count(ended.trained)} ({ended.trained / max(1, ended.tokens):.1%})",
        ],
        ["seconds", f"{ended.seconds:.1f}"],
    ]
    if ended.eval_loss is not None:
        cells.insert(4, ["loss on evaluation data", f"{ended.eval_loss:.4f}"])
    if ended.flops_of_standard is not None:
        cells.append(
            ["operations, of training every token (counted)", f"{ended.flops_of_standard:.0%}"]
        )
    return Table(f"{out}: the trained model", ["what", "how much"], cells)


def _questions(rows: int | None, split: str = "train") -> list[dict[str, Any]]:
    """Questions of the embedded models' world, as conversations."""
    from pliant import nano

    return [
        {
            "messages": [
                {"role": "user", "content": question.prompt},
                {"role": "assistant", "content": question.answer},
            ]
        }
        for question in nano.questions(split, rows or QUESTIONS)
    ]


def _within(length: int, config: Any) -> int:
    most = getattr(config, "max_position_embeddings", None)
    if isinstance(most, int) and length > most:
        raise InvalidInput(f"--length {length}: the model knows {most} positions")
    return length


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _notes() -> Any:
    """Our own warnings as one line each, those of the libraries not at all."""
    from contextlib import contextmanager

    from pliant.gradients import GradientsWarning
    from pliant.gradients.biased import BiasedWarning

    @contextmanager
    def told() -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for kind in (GradientsWarning, BiasedWarning):
                warnings.simplefilter("always", kind)
            warnings.showwarning = lambda message, *_, **__: _say(f"note: {message}")
            yield

    return told()
