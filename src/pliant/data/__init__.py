"""Rows and conversations: files and hub data sets, splits, duplicates, chat templates, batches.

    rows = read_rows("questions.jsonl", columns=("prompt", "answer"))
    with Journal("labels.jsonl", key="prompt") as journal:
        for row in rows:
            if row["prompt"] not in journal:
                journal.add({**row, "right": grade(row)})

A row is a dict. The collator (`pliant.data.collate`) needs torch, so this module leaves it out.
"""

from pliant.data.chat import (
    assistant_tokens,
    chat_ids,
    chat_text,
    check_messages,
    check_text,
    has_chat_template,
    ordinary_text,
)
from pliant.data.formats import Row
from pliant.data.journal import Journal
from pliant.data.rows import (
    Duplicates,
    duplicates,
    normalised,
    read_prompts,
    read_rows,
    splits,
    write_rows,
)

__all__ = [
    "Duplicates",
    "Journal",
    "Row",
    "assistant_tokens",
    "chat_ids",
    "chat_text",
    "check_messages",
    "check_text",
    "duplicates",
    "has_chat_template",
    "normalised",
    "ordinary_text",
    "read_prompts",
    "read_rows",
    "splits",
    "write_rows",
]
