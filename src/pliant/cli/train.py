"""`pliant train`: a language model trained in a folder, on all tokens or on the useful ones."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pliant.cli import terminal
from pliant.cli.gradient_commands import options
from pliant.errors import InvalidInput

if TYPE_CHECKING:
    from pliant.gradients.config import GradientConfig
    from pliant.gradients.runs.texts import Texts

EXAMPLE = "pliant train --model nano-s --data notes.txt --out mine"
EMBEDDED = "nano"
QUESTIONS = 1000


def train(
    model: options.Model,
    data: options.Data,
    out: Annotated[Path, typer.Option(help="The run's folder, and in the end the model's.")],
    engine: Annotated[
        str,
        typer.Option(
            help="auto: a short race decides. Or sparse, exact, completion: how the chosen tokens "
            "are trained."
        ),
    ] = "auto",
    ratio: options.Ratio = 0.25,
    selection: options.Selection = None,
    score: options.Score = None,
    choose: options.Choose = None,
    set: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Any of TrainingArguments; repeatable."),
    ] = None,
    evaluate: Annotated[
        str | None, typer.Option(help="Data like --data: its loss is measured at the end.")
    ] = None,
    length: options.Length = 512,
    rows: options.Rows = None,
    subset: options.Subset = None,
    lora: options.Lora = None,
    dtype: options.Dtype = "float32",
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume from the run's last complete checkpoint.")
    ] = False,
    json: options.Json = False,
) -> None:
    """Train a language model, on every token or on those that are worth a gradient.

    Killed at any moment, the run loses only the steps since its last checkpoint: the same command
    with --resume continues there and reaches the same losses.
    """
    from pliant.gradients import selective_run
    from pliant.gradients.runs.texts import read
    from pliant.loading import load
    from pliant.reports.tables import Table
    from pliant.training.arguments import pairs, training_arguments

    auto = engine == selective_run.AUTO
    config = _config(None if auto else engine, ratio, selection, score, choose)
    settings = pairs(set or [], "--set")
    training_arguments(out, settings)  # report mistakes before anything is loaded
    samples = read(data, subset=subset, limit=rows) if data != EMBEDDED else _questions(rows)
    loaded, tokenizer = load(model, dtype=dtype)
    texts = _texts(samples, tokenizer, length, loaded.config)
    evaluation = None
    if evaluate is not None:
        held_out = _questions(rows, "dev") if evaluate == EMBEDDED else read(evaluate)
        evaluation = _texts(held_out, tokenizer, length, loaded.config)
    if texts.left_out:
        _say(f"{texts.left_out} rows are left out: their completion begins beyond {length} tokens")
    plan = selective_run.Plan.of(model, data, texts, config, settings, lora, dtype, auto)
    with _notes():
        result = selective_run.train_lm(
            loaded, tokenizer, texts, out, plan, evaluation=evaluation, resume=resume, say=_say
        )
    if json:
        terminal.print_json({"out": str(out), **result.as_dict()})
    else:
        head = ["what", "how much"]
        Table(f"{out}: the trained model", head, result.cells()).draw(terminal.console())


def _config(
    engine: str | None,
    ratio: float,
    selection: str | None,
    score: str | None,
    choose: list[str] | None,
) -> GradientConfig:
    from pliant.gradients.config import GradientConfig
    from pliant.training.arguments import from_pairs, pairs

    texts, named = pairs(choose or [], "--choose"), {"selection": selection, "score": score}
    config = from_pairs(GradientConfig, texts, "--choose", engine=engine, ratio=ratio, **named)
    if config.needs_scores and config.score == "excess":
        raise InvalidInput(
            "score = 'excess' compares with a reference, which Python alone can give"
        )
    return config


def _texts(samples: list[dict[str, Any]], tokenizer: Any, length: int, config: Any) -> Texts:
    from pliant.gradients.runs.texts import texts

    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and length > positions:
        raise InvalidInput(f"--length {length}: the model knows {positions} positions")
    return texts(samples, tokenizer, length)


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


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextmanager
def _notes() -> Iterator[None]:
    """Our own warnings as one line each; those of the libraries are ignored."""
    from pliant.gradients import GradientsWarning
    from pliant.gradients.biased import BiasedWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind in (GradientsWarning, BiasedWarning):
            warnings.simplefilter("always", kind)
        warnings.showwarning = lambda message, *_, **__: _say(f"note: {message}")
        yield
