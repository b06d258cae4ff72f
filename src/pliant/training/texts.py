"""The data set of a causal language model: texts and instructions as token ids and labels.

Rows with `text` are plain text: they are joined, an end token between them, and split into pieces
of equal length; every token is trained on. Rows with `prompt` and `completion`, or with `messages`,
are instructions: each is a piece of its own, and only the completion (the assistant's messages) is
trained on. So are Alpaca's rows, with `instruction`, `input` and `output`. What instructions say
never becomes a control token; a text may hold some on purpose, of a chat that was rendered already.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pliant.data import (
    Row,
    assistant_tokens,
    check_messages,
    has_chat_template,
    ordinary_text,
)
from pliant.data.collate import IGNORED
from pliant.data.formats import alpaca_messages, alpaca_text
from pliant.errors import InvalidInput

Piece = dict[str, list[int]]
"""`input_ids` and `labels` of equal length."""


@dataclass(frozen=True)
class Texts:
    """The pieces to train on."""

    pieces: list[Piece]
    left_out: int = 0
    """The number of instructions whose completion begins beyond the length."""
    made_ordinary: int = 0
    """The number of prompts and completions whose special tokens were read as ordinary text."""

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.pieces).encode()).hexdigest()

    @property
    def tokens(self) -> int:
        return sum(len(piece["input_ids"]) for piece in self.pieces)

    @property
    def labelled(self) -> int:
        return sum(sum(label != IGNORED for label in piece["labels"][1:]) for piece in self.pieces)


def texts(rows: Sequence[Row], tokenizer: Any, length: int) -> Texts:
    """Rows as pieces of at most `length` tokens."""
    if not rows:
        raise InvalidInput("there are no rows to train on")
    kind = _kind(rows)
    if kind == "text":
        return Texts(list(_split(_ids_of_texts(rows, tokenizer), length)))
    encode = {"messages": _of_conversation, "pair": _of_pair, "alpaca": _of_alpaca}[kind]
    instructions = [encode(row, tokenizer, f"row {i}") for i, row in enumerate(rows, start=1)]
    short = [{key: ids[:length] for key, ids in piece.items()} for piece, _ in instructions]
    pieces = [piece for piece in short if any(x != IGNORED for x in piece["labels"][1:])]
    if not pieces:
        raise InvalidInput(f"no completion begins within {length} tokens: raise --length")
    made_ordinary = sum(was_special for _, was_special in instructions)
    return Texts(pieces, len(short) - len(pieces), made_ordinary)


# --- plain text ----------------------------------------------------------------------------------


def _ids_of_texts(rows: Sequence[Row], tokenizer: Any) -> Iterator[int]:
    for i, row in enumerate(rows, start=1):
        if not isinstance(row["text"], str):
            raise InvalidInput(f"row {i}: its text is {str(row['text'])[:60]}, which is not text")
        yield from tokenizer(row["text"], verbose=False)["input_ids"]
        if tokenizer.eos_token_id is not None:
            yield tokenizer.eos_token_id


def _split(ids: Iterator[int], length: int) -> Iterator[Piece]:
    tokens = list(ids)
    if len(tokens) < 2:
        raise InvalidInput("the text is empty: there is nothing to train on")
    for start in range(0, len(tokens), length):
        piece = tokens[start : start + length]
        if len(piece) > 1:
            yield {"input_ids": piece, "labels": list(piece)}


# --- instructions --------------------------------------------------------------------------------


Instruction = tuple[Piece, bool]
"""A piece, and whether special tokens of its prompt or completion were read as ordinary text."""


def _of_pair(row: Row, tokenizer: Any, where: str) -> Instruction:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return _of_messages([*prompt, *completion], tokenizer, where)
    if not (isinstance(prompt, str) and isinstance(completion, str)):
        raise InvalidInput(f"{where}: prompt and completion are texts, or both lists of messages")
    question = ordinary_text(prompt, tokenizer, "user")
    reply = ordinary_text(completion, tokenizer, "assistant")
    before = tokenizer(question, verbose=False)["input_ids"]
    answer = tokenizer(reply, add_special_tokens=False, verbose=False)["input_ids"]
    if tokenizer.eos_token_id is not None:
        answer = [*answer, tokenizer.eos_token_id]
    labels = [IGNORED] * len(before) + list(answer)
    was_special = (question, reply) != (prompt, completion)
    return {"input_ids": [*before, *answer], "labels": labels}, was_special


def _of_alpaca(row: Row, tokenizer: Any, where: str) -> Instruction:
    if not (isinstance(row["instruction"], str) and isinstance(row["output"], str)):
        raise InvalidInput(f"{where}: its instruction and output are texts in Alpaca's format")
    if has_chat_template(tokenizer):
        return _of_messages(alpaca_messages(row), tokenizer, where)
    pair = {"prompt": alpaca_text(row), "completion": row["output"]}
    return _of_pair(pair, tokenizer, where)


def _of_conversation(row: Row, tokenizer: Any, where: str) -> Instruction:
    return _of_messages(row["messages"], tokenizer, where)


def _of_messages(messages: Any, tokenizer: Any, where: str) -> Instruction:
    """The assistant's messages are trained on."""
    check_messages(messages, where)
    if not any(message["role"] == "assistant" for message in messages):
        raise InvalidInput(f"{where}: no message is the assistant's, so there is nothing to learn")
    ids, assistant = assistant_tokens(messages, tokenizer, where=where)
    pairs = zip(ids, assistant, strict=True)
    return {"input_ids": ids, "labels": [i if learned else IGNORED for i, learned in pairs]}, False


def _kind(rows: Sequence[Row]) -> str:
    """The kind of all rows."""
    for kind, columns in KINDS.items():
        if set(columns) <= rows[0].keys():
            for i, row in enumerate(rows, start=1):
                if missing := set(columns) - row.keys():
                    raise InvalidInput(f"row {i} has no {min(missing)!r}, and the first row has")
            return kind
    raise InvalidInput(
        "nothing to train on: a row holds text, or prompt and completion, or messages (or Alpaca's "
        "or ShareGPT's columns); the first has "
        f"{', '.join(map(repr, rows[0])) or 'nothing'}. On the command line, --prompt-column and "
        "the like name other columns"
    )


KINDS = {
    "messages": ("messages",),
    "pair": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),  # before text, which repeats both in Alpaca's own data
    "text": ("text",),
}
