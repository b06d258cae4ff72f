"""Rows in, rows out: files and hub data sets, splits, duplicates, and a journal that survives.

    rows = read_rows("questions.jsonl", columns=("prompt", "answer"))
    with Journal("labels.jsonl", key="prompt") as journal:
        for row in rows:
            if row["prompt"] not in journal:
                journal.add({**row, "right": grade(row)})

A row is a dict.
"""

from pliant.data.journal import Journal
from pliant.data.parts import Duplicates, duplicates, normalised, splits
from pliant.data.rows import Row, nearest, read_rows, write_rows

__all__ = [
    "Duplicates",
    "Journal",
    "Row",
    "duplicates",
    "nearest",
    "normalised",
    "read_rows",
    "splits",
    "write_rows",
]
