"""What `pliant gradients` works on: a model, and pieces of text for it."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pliant.cli.gradients.options import SelectiveOptions
from pliant.errors import InvalidInput

if TYPE_CHECKING:
    from pliant.training.texts import Texts

EMBEDDED = "nano"
QUESTIONS = 400


@dataclass(frozen=True)
class Inputs:
    """A model, its tokenizer, and the data in pieces of ids and labels, shuffled."""

    model: Any
    tokenizer: Any
    pieces: list[dict[str, list[int]]]

    def batches(self, size: int, count: int) -> list[dict[str, Any]]:
        from pliant.data.collate import Collator

        padded = Collator.of(self.tokenizer)
        starts = range(0, min(len(self.pieces), size * count), size)
        return [padded(self.pieces[start : start + size]) for start in starts]


def load_inputs(options: SelectiveOptions, device: str | None, seed: int) -> Inputs:
    """Read the data, which can fail at once, then load the model and cut the data into pieces."""
    from pliant.loading import load

    rows = read_data(options, "dev", QUESTIONS)
    model, tokenizer = load(options.model, dtype=options.dtype, device=device)
    pieces = encode(rows, model, tokenizer, options.length).pieces
    random.Random(seed).shuffle(pieces)
    return Inputs(model, tokenizer, pieces)


def read_data(options: SelectiveOptions, split: str, questions: int) -> list[dict[str, Any]]:
    """The rows of --data; of the embedded models' world, so many questions of a split."""
    if options.data == EMBEDDED:
        from pliant import nano

        return nano.conversations(split, options.rows or questions)
    from pliant.data import read_rows

    return read_rows(options.data, subset=options.subset, limit=options.rows)


def encode(rows: list[dict[str, Any]], model: Any, tokenizer: Any, length: int) -> Texts:
    """The rows in pieces of at most `length` tokens, which must fit the model's context."""
    from pliant.training.texts import texts

    positions = getattr(model.config, "max_position_embeddings", None)
    if isinstance(positions, int) and length > positions:
        raise InvalidInput(f"--length {length}: the model has {positions} positions")
    return texts(rows, tokenizer, length)


@contextmanager
def quiet_libraries(*kinds: type[Warning]) -> Iterator[None]:
    """Print our own warnings, and those of `kinds`, as one line each; none of the libraries'."""
    import sys

    from transformers.utils import logging

    from pliant.gradients import GradientsWarning

    logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", GradientsWarning)
        for kind in kinds:
            warnings.simplefilter("always", kind)
        warnings.showwarning = lambda message, *_, **__: print(f"note: {message}", file=sys.stderr)
        yield
