"""`pliant route grade`: record which of a router's answers were right, so that it can learn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pliant.cli import terminal
from pliant.cli.shared_options import AnswerColumns
from pliant.errors import InvalidInput

if TYPE_CHECKING:
    from pliant.routing.live.grades import Grade, StoredAnswer
    from pliant.routing.live.ledger import Ledger

    Verify = Callable[[StoredAnswer], float | None]
    """The grade of an answer; None where there is no reference for it."""


@dataclass(frozen=True, kw_only=True)
class GradeOptions(AnswerColumns):
    router: Path
    """The folder that `pliant route fit` wrote."""
    grades: str | None = None
    """JSONL, CSV or parquet: rows of id and right, and of model for explored prompts; or of prompt,
    model and right. Rows whose right is empty are skipped."""
    verifier: str | None = None
    """Grade the answers to explored prompts that lack a grade: exact, numeric, contains, regex,
    choice, or grade.py:function."""
    references: str | None = None
    """For --verifier: rows of prompt and answer, the right one."""
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
    from pliant.data import write_rows
    from pliant.files import check_writable
    from pliant.routing.learning import open_ledger

    sources = (options.grades, options.verifier, options.ungraded)
    if sources == (None, None, None):
        raise InvalidInput("nothing to do: give --grades FILE, --verifier, or --ungraded FILE")
    if options.references is not None and options.verifier is None:
        raise InvalidInput("--references: are for a verifier; give --verifier as well")
    options.check_columns()
    columns = {"prompt": options.prompt_column, "messages": options.messages_column}
    for name, column in {**columns, **options.answers()}.items():
        if column is not None and options.references is None:
            raise InvalidInput(f"--{name}-column names a column of --references: give them as well")
    read, verify = _grades(options), _verifier(options)
    if options.ungraded is not None:
        check_writable(options.ungraded)
    result: dict[str, Any] = {}
    with open_ledger(options.router, options.ledger) as ledger:
        if read is not None:
            result |= _recorded(ledger, read, options)
        if verify is not None:
            result |= _verified(ledger, verify, result.get("graded", 0))
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


def _grades(options: GradeOptions) -> list[Grade | None] | None:
    """The grades of the file, None for rows without one."""
    from pliant.data import read_rows
    from pliant.routing.live.grades import Grade

    if options.grades is None:
        return None
    return [
        None if row["right"] in (None, "") else Grade.of_row(row, f"{options.grades}, row {i}")
        for i, row in enumerate(read_rows(options.grades, ["right"]), 1)
    ]


def _recorded(ledger: Ledger, rows: list[Grade | None], options: GradeOptions) -> dict[str, Any]:
    """Record all grades, or none if one of them is wrong."""
    grades = [grade for grade in rows if grade is not None]
    counts = ledger.grades.record(terminal.track(grades, "grading"))
    if not any(counts):
        raise InvalidInput(
            f"{options.grades}: none of its {len(rows):,} rows grades an answer in the ledger"
        )
    skipped = len(rows) - len(grades)
    return {"graded": sum(counts), "skipped": skipped, "unknown": counts.count(0)}


def _verifier(options: GradeOptions) -> Verify | None:
    """From a stored answer to its grade; None for one without a reference."""
    from pliant.routing.prompts import text_of
    from pliant.verify import Function, Verifier, verifier

    name = options.verifier
    if name is None:
        return None
    own = ":" in name
    right: Verifier = Function(name) if own else verifier(name)
    if options.references is None and not own:
        raise InvalidInput(f"--verifier {name} needs --references: rows of prompt and answer")
    rows = [] if options.references is None else options.read(options.references, "answer")
    references = {text_of(row["prompt"]): row["answer"] for row in rows}

    def verify(stored: StoredAnswer) -> float | None:
        if stored.prompt not in references and not own:
            return None
        return right(stored.answer, references.get(stored.prompt), stored.prompt)

    return verify


def _verified(ledger: Ledger, verify: Verify, before: int) -> dict[str, Any]:
    from pliant.routing.live.grades import Grade

    left = ledger.grades.answers(graded=False)
    shares = [(each, verify(each)) for each in terminal.track(left, "verifying")]
    grades = [
        Grade(share, each.row, model=each.model) for each, share in shares if share is not None
    ]
    ledger.grades.record(grades)
    return {"graded": before + len(grades), "no reference": len(left) - len(grades)}


def _draw(result: dict[str, Any], options: GradeOptions) -> None:
    sentences = []
    if "graded" in result:
        more = ""
        if result.get("skipped"):
            more += f" {result['skipped']:,} rows without a grade were skipped."
        if result.get("unknown"):
            more += f" The ledger has no answer for {result['unknown']:,} rows."
        if result.get("no reference"):
            more += f" {result['no reference']:,} answers have no reference."
        sentences.append(f"{result['graded']:,} answers graded.{more}")
    if "ungraded" in result:
        sentences.append(f"{result['ungraded']:,} answers without a grade in {options.ungraded}.")
    sentences.append(
        f"{result['complete']:,} of {result['explored']:,} explored prompts have a grade for every "
        "answer: `pliant route learn` uses these."
    )
    for sentence in sentences:
        terminal.print_text(sentence)
