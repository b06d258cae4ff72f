"""The text that commands train, measure or calibrate on, and the length of its pieces."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pliant.errors import InvalidInput

if TYPE_CHECKING:
    from pliant.cli.shared_options import RowOptions
    from pliant.training.texts import Texts

EMBEDDED = "nano"
"""Names the questions of the embedded models' world."""
TOKENS_IN_A_QUESTION = 8
"""Of that world, at least."""


def read_data(
    data: str, split: str, questions: int, options: RowOptions, *, evaluates: bool = False
) -> list[dict[str, Any]]:
    """The rows of --data; of the embedded models' world, so many questions of a split.

    Of other data that `evaluates`, all rows are read.
    """
    columns = options.columns()
    if data == EMBEDDED:
        from pliant import nano

        return nano.conversations(split, options.rows or questions)
    from pliant.data import read_rows

    limit, subset = (None, None) if evaluates else (options.rows, options.subset)
    rows = read_rows(data, columns, subset=subset, limit=limit)
    return [{name: row[name] for name in columns} for row in rows] if columns else rows


def check_template(rows: list[dict[str, Any]], model: str) -> None:
    """Refuse conversations for a tokenizer without a chat template before weights are loaded."""
    if not any(isinstance(rows[0].get(name), list) for name in ("messages", "prompt")):
        return
    from pliant.data import has_chat_template
    from pliant.loading import load_tokenizer

    if not has_chat_template(load_tokenizer(model)):
        raise InvalidInput(
            f"--data holds conversations, and the tokenizer of {model} has no chat template: give "
            "text, or prompt and completion as texts"
        )


def encode(rows: list[dict[str, Any]], model: Any, tokenizer: Any, length: int) -> Texts:
    """The rows in pieces of at most `length` tokens, which must fit the model's context."""
    from pliant.training.terminal import print_to_stderr
    from pliant.training.texts import texts

    positions = getattr(model.config, "max_position_embeddings", None)
    if isinstance(positions, int) and length > positions:
        raise InvalidInput(f"--length {length}: the model has {positions} positions")
    encoded = texts(rows, tokenizer, length)
    if encoded.made_ordinary:
        print_to_stderr(
            f"rows with special tokens: {encoded.made_ordinary}; they are read as ordinary text "
            "(give conversations as messages, and rendered ones as text)"
        )
    return encoded


def default_data(model: str) -> str | None:
    """Where a command's text comes from if it is given none: nano models have a world."""
    return EMBEDDED if model.startswith("nano-") else None


def calibration_rows(data: str | None, tokens: int, options: RowOptions) -> list[dict[str, Any]]:
    """The rows of --data, and of the embedded models' world enough questions for so many tokens."""
    if data is None:
        raise InvalidInput(
            "calibration text is needed: --data notes.txt (or --data nano, questions of the "
            "embedded models' world)"
        )
    return read_data(data, "train", 1 + tokens // TOKENS_IN_A_QUESTION, options)


def fitting_length(length: int, config: Any) -> int:
    """No longer than the model's context."""
    positions = getattr(config, "max_position_embeddings", None)
    return min(length, positions) if isinstance(positions, int) else length
