"""`python -m pliant.survey docs/architectures.md`: measure every architecture, write the page."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pliant.adapters.files import write_file
from pliant.cli.app import run_program
from pliant.options import Flag
from pliant.survey.matrix import Row, page, rows


@dataclass(frozen=True)
class SurveyOptions:
    page: Annotated[Path, Flag(positional=True)]
    """The Markdown file to write."""


def survey(options: SurveyOptions) -> None:
    """Measure every architecture and write the page.

    Example: python -m pliant.survey docs/architectures.md
    """
    write(options.page, page(list(map(_report, rows()))))


def write(path: Path, text: str) -> None:
    """Write the text, completely or not at all, in a folder that need not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, text.encode())


def _report(row: Row) -> Row:
    """Print the row's number of yeses to stderr."""
    yes = sum(answer.ok for answer in row.answers.values())
    print(f"{row.name}: {yes} of {len(row.answers)}", file=sys.stderr)
    return row


if __name__ == "__main__":
    run_program(survey, "python -m pliant.survey")
