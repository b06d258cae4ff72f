"""The data of commands that train or measure on text: read, then split into pieces of tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pliant.errors import InvalidInput

if TYPE_CHECKING:
    from pliant.training.texts import Texts

EMBEDDED = "nano"
"""Names the questions of the embedded models' world."""


def read_data(
    data: str, split: str, questions: int, *, limit: int | None = None, subset: str | None = None
) -> list[dict[str, Any]]:
    """The rows of --data; of the embedded models' world, so many questions of a split."""
    if data == EMBEDDED:
        from pliant import nano

        return nano.conversations(split, limit or questions)
    from pliant.data import read_rows

    return read_rows(data, subset=subset, limit=limit)


def encode(rows: list[dict[str, Any]], model: Any, tokenizer: Any, length: int) -> Texts:
    """The rows in pieces of at most `length` tokens, which must fit the model's context."""
    from pliant.training.texts import texts

    positions = getattr(model.config, "max_position_embeddings", None)
    if isinstance(positions, int) and length > positions:
        raise InvalidInput(f"--length {length}: the model has {positions} positions")
    return texts(rows, tokenizer, length)
