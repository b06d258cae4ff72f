"""What an expert trains on: prompts as token ids, and the columns that the reward needs."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pliant.data import (
    Row,
    chat_ids,
    check_text,
    has_chat_template,
    normalised,
    ordinary_text,
    splits,
)
from pliant.errors import InvalidInput

HELD_OUT = 0.2
"""The share of the rows that is held out,"""
MOST_HELD_OUT = 200
"""but no more rows than this."""


@dataclass(frozen=True)
class Task:
    """Rows with a prompt each, encoded for one model."""

    rows: list[Row]
    """All with the same columns."""
    ids: list[list[int]]
    """The prompts' token ids, with the generation prompt of the chat template."""

    @property
    def digest(self) -> str:
        content = json.dumps([self.rows, self.ids], default=str, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def columns(self, rows: Sequence[int]) -> dict[str, list[Any]]:
        """The columns besides the prompt, as trl's rewards take them."""
        names = [name for name in self.rows[0] if name != "prompt"]
        return {name: [self.rows[i][name] for i in rows] for name in names}


def encode(rows: Sequence[Row], tokenizer: Any, chat: bool = True, longest: int = 0) -> Task:
    """The task of these rows; no prompt may have more than `longest` tokens (0: any)."""
    if not rows:
        raise InvalidInput("the task has no rows")
    names = list(dict.fromkeys(name for row in rows for name in row))
    ids = [
        prompt_ids(row.get("prompt"), tokenizer, chat, f"row {i}")
        for i, row in enumerate(rows, start=1)
    ]
    for i, prompt in enumerate(ids, start=1):
        if longest and len(prompt) > longest:
            raise InvalidInput(
                f"row {i}: its prompt has {len(prompt):,} tokens, and with the answer at most "
                f"{longest:,} fit the model's context: leave it out, or lower max_new_tokens"
            )
    return Task([{name: row.get(name) for name in names} for row in rows], ids)


def prompt_ids(prompt: Any, tokenizer: Any, chat: bool, where: str) -> list[int]:
    """A text or a list of messages as token ids."""
    if isinstance(prompt, str):
        check_text(prompt, where)
        if not (chat and has_chat_template(tokenizer)):
            ids: list[int] = tokenizer(ordinary_text(prompt, tokenizer), verbose=False)["input_ids"]
            if not ids:
                raise InvalidInput(f"{where}: its prompt is empty")
            return ids
        prompt = [{"role": "user", "content": prompt}]
    return chat_ids(prompt, tokenizer, where=where)


def hold_out(rows: Sequence[Row], seed: int, limit: int = MOST_HELD_OUT) -> tuple[list, list]:
    """The rows to train on, and the held-out ones; rows with the same prompt stay together."""
    if len(rows) < 2:
        raise InvalidInput(
            f"the task has {len(rows)} row(s), and some are held out: give two or more"
        )
    keys = [normalised(json.dumps(row["prompt"], default=str)) for row in rows]
    share = min(HELD_OUT, limit / len(rows))
    learned, held_out = splits(len(rows), (1 - share, share), seed, keys)
    counts = Counter(keys)
    if not held_out and len(counts) > 1:  # too few prompts for the share: the rarest of them
        rarest = min(counts, key=counts.__getitem__)
        learned = [i for i, key in enumerate(keys) if key != rarest]
        held_out = [i for i, key in enumerate(keys) if key == rarest]
    if not learned or not held_out:
        raise InvalidInput("the task's rows all have the same prompt: give others to train on")
    return [rows[i] for i in learned], [rows[i] for i in held_out]
