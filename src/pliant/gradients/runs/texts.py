"""Texts and instructions as token ids and labels: what a causal language model is trained on.

Rows with `text` are plain text: they follow each other, an end token between, in pieces of equal
length, and every token is learned. Rows with `prompt` and `completion`, or with `messages`, are
instructions: each is a piece of its own, and only the completion (what the assistant says) is
learned.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pliant.data import Row, read_rows
from pliant.errors import InvalidInput
from pliant.gradients.batch import IGNORED

TEXT_FILES = (".txt", ".text", ".md")
Piece = dict[str, list[int]]
"""`input_ids` and `labels`, of one length; and, once `numbered`, which piece it is."""


@dataclass(frozen=True)
class Texts:
    """What is trained on, piece by piece."""

    pieces: list[Piece]
    left_out: int = 0
    """Instructions whose completion lies beyond the length that was asked for."""

    @property
    def tokens(self) -> int:
        return sum(len(piece["input_ids"]) for piece in self.pieces)

    @property
    def labelled(self) -> int:
        return sum(sum(label != IGNORED for label in piece["labels"][1:]) for piece in self.pieces)


def read(source: str, *, subset: str | None = None, limit: int | None = None) -> list[Row]:
    """The rows of a text file (one row: the whole of it), of a file of rows, or of a data set."""
    path = Path(source).expanduser()
    if path.suffix.lower() not in TEXT_FILES:
        return read_rows(source, subset=subset, limit=limit)
    if not path.is_file():
        raise InvalidInput(f"{path}: there is no such file")
    try:
        return [{"text": path.read_text(encoding="utf-8")}]
    except UnicodeDecodeError:
        raise InvalidInput(f"{path} is no text file in UTF-8") from None


def texts(rows: Sequence[Row], tokenizer: Any, length: int) -> Texts:
    """Rows as pieces of at most `length` tokens."""
    if not rows:
        raise InvalidInput("there are no rows to train on")
    kind = _kind(rows)
    if kind == "text":
        return Texts(list(_cut(_ids_of_texts(rows, tokenizer), length)))
    made = [
        _of_messages(row["messages"], tokenizer, f"row {i}")
        if kind == "messages"
        else _of_pair(row, tokenizer, f"row {i}")
        for i, row in enumerate(rows, start=1)
    ]
    short = [{key: ids[:length] for key, ids in piece.items()} for piece in made]
    kept = [piece for piece in short if any(x != IGNORED for x in piece["labels"][1:])]
    if not kept:
        raise InvalidInput(f"no completion begins within {length} tokens: raise --length")
    return Texts(kept, len(short) - len(kept))


def numbered(pieces: Sequence[Piece]) -> list[Piece]:
    """Each with its place, by which its scores are kept."""
    return [{**piece, "example_id": [i]} for i, piece in enumerate(pieces)]


class Padded:
    """A batch of pieces: filled up on the right, to the longest."""

    def __init__(self, tokenizer: Any) -> None:
        pad = tokenizer.pad_token_id
        self.pad = int(tokenizer.eos_token_id or 0) if pad is None else int(pad)

    def __call__(self, pieces: Sequence[Piece]) -> dict[str, Tensor]:
        longest = max(len(piece["input_ids"]) for piece in pieces)
        ids, labels, mask = [], [], []
        for piece in pieces:
            known = len(piece["input_ids"])
            ids.append(piece["input_ids"] + [self.pad] * (longest - known))
            labels.append(piece["labels"] + [IGNORED] * (longest - known))
            mask.append([1] * known + [0] * (longest - known))
        batch = {
            "input_ids": torch.tensor(ids),
            "labels": torch.tensor(labels),
            "attention_mask": torch.tensor(mask),
        }
        if "example_id" in pieces[0]:
            batch["example_id"] = torch.tensor([piece["example_id"][0] for piece in pieces])
        return batch


# --- plain text ----------------------------------------------------------------------------------


def _ids_of_texts(rows: Sequence[Row], tokenizer: Any) -> Iterator[int]:
    for i, row in enumerate(rows, start=1):
        if not isinstance(row["text"], str):
            raise InvalidInput(f"row {i}: its text is {type(row['text']).__name__}, not a string")
        yield from tokenizer(row["text"], verbose=False)["input_ids"]
        if tokenizer.eos_token_id is not None:
            yield tokenizer.eos_token_id


def _cut(ids: Iterator[int], length: int) -> Iterator[Piece]:
    every = list(ids)
    if len(every) < 2:
        raise InvalidInput("the text is empty: there is nothing to train on")
    for start in range(0, len(every), length):
        piece = every[start : start + length]
        if len(piece) > 1:
            yield {"input_ids": piece, "labels": list(piece)}


# --- instructions --------------------------------------------------------------------------------


def _of_pair(row: Row, tokenizer: Any, where: str) -> Piece:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return _of_messages([*prompt, *completion], tokenizer, where)
    if not (isinstance(prompt, str) and isinstance(completion, str)):
        raise InvalidInput(f"{where}: prompt and completion are texts, or both lists of messages")
    asked = tokenizer(prompt, verbose=False)["input_ids"]
    answer = tokenizer(completion, add_special_tokens=False, verbose=False)["input_ids"]
    if tokenizer.eos_token_id is not None:
        answer = [*answer, tokenizer.eos_token_id]
    return {"input_ids": [*asked, *answer], "labels": [IGNORED] * len(asked) + list(answer)}


def _of_messages(messages: Any, tokenizer: Any, where: str) -> Piece:
    """What the assistant says is learned: what its message adds to the conversation before it."""
    _check_messages(messages, tokenizer, where)
    ids = _ids_of(messages, tokenizer)
    labels = [IGNORED] * len(ids)
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _ids_of(messages[:i], tokenizer, add_generation_prompt=True)
        after = _ids_of(messages[: i + 1], tokenizer)
        if ids[: len(after)] != after or after[: len(before)] != before:
            raise InvalidInput(
                f"{where}: the chat template writes a message otherwise once another follows, so "
                "it cannot be told which tokens are the assistant's. Give prompt and completion"
            )
        labels[len(before) : len(after)] = after[len(before) :]
    return {"input_ids": ids, "labels": labels}


def _ids_of(messages: Any, tokenizer: Any, **options: Any) -> list[int]:
    if not messages:
        return []
    made = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
    return list(made["input_ids"])


def _check_messages(messages: Any, tokenizer: Any, where: str) -> None:
    if not tokenizer.chat_template:
        raise InvalidInput(f"{where}: the model has no chat template: give prompt and completion")
    right = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in messages
    )
    if not right or not any(m["role"] == "assistant" for m in messages):
        raise InvalidInput(
            f"{where}: messages are a list of "
            '{"role": "user", "content": "..."}, one of them at least the assistant\'s'
        )


def _kind(rows: Sequence[Row]) -> str:
    """The one way in which all rows can be read."""
    for kind, columns in KINDS.items():
        if set(columns) <= rows[0].keys():
            for i, row in enumerate(rows, start=1):
                if missing := set(columns) - row.keys():
                    raise InvalidInput(f"row {i} has no {min(missing)!r}, and the first row has")
            return kind
    raise InvalidInput(
        "nothing to train on: a row holds text, or prompt and completion, or messages; the first "
        f"has {', '.join(map(repr, rows[0])) or 'nothing'}"
    )


KINDS = {"messages": ("messages",), "pair": ("prompt", "completion"), "text": ("text",)}
