"""What `pliant gradients` works on: a model, and pieces of text for it."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pliant.cli import terminal
from pliant.errors import InvalidInput

if TYPE_CHECKING:
    from pliant.gradients.config import GradientConfig

EMBEDDED = "nano"
QUESTIONS = 400


@dataclass(frozen=True)
class Lessons:
    """Loaded, and in pieces of ids and labels, in an order drawn at random."""

    model: Any
    tokenizer: Any
    pieces: list[dict[str, list[int]]]

    def batches(self, size: int, count: int) -> list[dict[str, Any]]:
        from pliant.gradients.runs.texts import Padded

        padded = Padded(self.tokenizer)
        starts = range(0, min(len(self.pieces), size * count), size)
        return [padded(self.pieces[at : at + size]) for at in starts]


def open_lessons(
    model: str,
    data: str,
    length: int,
    *,
    rows: int | None = None,
    subset: str | None = None,
    dtype: str = "float32",
    device: str | None = None,
    seed: int = 0,
) -> Lessons:
    """What is wrong with the data is said before the model is loaded."""
    from pliant.gradients.runs import texts

    found = _questions(rows) if data == EMBEDDED else texts.read(data, subset=subset, limit=rows)
    from pliant.loading import load

    loaded, tokenizer = load(model, dtype=dtype, device=device)
    most = getattr(loaded.config, "max_position_embeddings", None)
    if isinstance(most, int) and length > most:
        raise InvalidInput(f"--length {length}: the model knows {most} positions")
    pieces = texts.texts(found, tokenizer, length).pieces
    random.Random(seed).shuffle(pieces)
    return Lessons(loaded, tokenizer, pieces)


def config_of(
    engine: str,
    ratio: float,
    selection: str | None,
    score: str | None,
    choose: Sequence[str] | None,
) -> GradientConfig:
    """From the options; what needs another model than this one is refused."""
    from pliant.gradients.config import GradientConfig
    from pliant.training.arguments import from_pairs, pairs

    texts, named = pairs(choose or [], "--choose"), {"selection": selection, "score": score}
    config = from_pairs(GradientConfig, texts, "--choose", engine=engine, ratio=ratio, **named)
    if config.needs_scores and config.score == "excess":
        raise InvalidInput(
            "score = 'excess' compares with a reference, which Python alone can give"
        )
    return config


@contextmanager
def quietly() -> Iterator[None]:
    """Our own warnings as one line each, those of the libraries not at all."""
    import sys

    from transformers.utils import logging

    from pliant.gradients import GradientsWarning

    logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", GradientsWarning)
        warnings.showwarning = lambda message, *_, **__: print(f"note: {message}", file=sys.stderr)
        yield


def say(sentence: str) -> None:
    console = terminal.console()
    console.print(sentence, markup=False, soft_wrap=not console.is_terminal)


def _questions(rows: int | None) -> list[dict[str, Any]]:
    """Questions of the embedded models' world that they have not seen, as conversations."""
    from pliant import nano

    return [
        {
            "messages": [
                {"role": "user", "content": question.prompt},
                {"role": "assistant", "content": question.answer},
            ]
        }
        for question in nano.questions("dev", rows or QUESTIONS)
    ]
