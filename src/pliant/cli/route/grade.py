"""`pliant route grade`: record which of a router's answers were right, so that it can learn."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pliant.cli import terminal
from pliant.errors import InvalidInput

if TYPE_CHECKING:
    from pliant.routing.live.ledger import Ledger


@dataclass(frozen=True, kw_only=True)
class GradeOptions:
    router: Path
    """The folder that `pliant route fit` wrote."""
    grades: str | None = None
    """JSONL, CSV or parquet: rows of id and right, and of model for explored prompts; or of prompt,
    model and right. Rows whose right is empty are skipped."""
    ungraded: Path | None = None
    """Write the answers to explored prompts that lack a grade to this file (.jsonl): fill in right,
    and grade with it."""
    ledger: Path | None = None
    """Another file of the ledger than the router's own."""
    json: bool = False
    """Print one JSON document."""


def grade(options: GradeOptions) -> None:
    """Record which of a router's answers were right, so that it can learn.

    The id of an answer is `row` in the output of `pliant route ask --json`; the latest grade of an
    answer counts. Exit code 2 if no grade fits an answer in the ledger.

    Example: pliant route grade --router my-router --grades grades.jsonl
    """
    from pliant.data import read_rows, write_rows
    from pliant.files import check_writable
    from pliant.routing.learning import open_ledger

    if options.grades is None and options.ungraded is None:
        raise InvalidInput("nothing to do: give --grades FILE, or --ungraded FILE to write one")
    rows = [] if options.grades is None else read_rows(options.grades, ["right"])
    if options.ungraded is not None:
        check_writable(options.ungraded)
    with open_ledger(options.router, options.ledger) as ledger:
        result: dict[str, Any] = {} if options.grades is None else _graded(ledger, rows, options)
        if options.ungraded is not None:
            left = [answer.as_dict() for answer in ledger.grades.answers(graded=False)]
            write_rows(options.ungraded, left)
            result |= {"ungraded": len(left)}
        explored = ledger.grades.exploration()
    result |= {"explored": explored["prompts"], "complete": explored["graded"]}
    if options.json:
        terminal.print_json(result)
    else:
        _draw(result, options)


def _graded(ledger: Ledger, rows: list[dict[str, Any]], options: GradeOptions) -> dict[str, Any]:
    """Record all grades, or none if a row is wrong."""
    from pliant.routing.live.grades import Grade

    grades = [
        Grade.of_row(row, f"{options.grades}, row {i}")
        for i, row in enumerate(rows, 1)
        if row["right"] not in (None, "")
    ]
    counts = ledger.grades.record(terminal.track(grades, "grading"))
    if not any(counts):
        raise InvalidInput(
            f"{options.grades}: none of its {len(rows):,} rows grades an answer in the ledger"
        )
    return {
        "graded": sum(counts),
        "skipped": len(rows) - len(grades),
        "unknown": counts.count(0),
    }


def _draw(result: dict[str, Any], options: GradeOptions) -> None:
    sentences = []
    if "graded" in result:
        more = ""
        if result["skipped"]:
            more += f" {result['skipped']:,} rows without a grade were skipped."
        if result["unknown"]:
            more += f" The ledger has no answer for {result['unknown']:,} rows."
        sentences.append(f"{result['graded']:,} answers graded.{more}")
    if "ungraded" in result:
        sentences.append(f"{result['ungraded']:,} answers without a grade in {options.ungraded}.")
    sentences.append(
        f"{result['complete']:,} of {result['explored']:,} explored prompts have a grade for every "
        "answer: `pliant route learn` uses these."
    )
    for sentence in sentences:
        terminal.print_text(sentence)
