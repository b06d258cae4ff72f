"""`python -m pliant.survey docs/architectures.md`: measure every architecture, write the page."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from pliant.survey.matrix import Row, page, rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m pliant.survey", description=__doc__)
    parser.add_argument("page", type=Path, help="the Markdown file to write")
    write(parser.parse_args().page, page(list(map(_report, rows()))))


def write(path: Path, text: str) -> None:
    """Write the text completely or not at all, by way of a temporary file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, prefix=path.name, delete=False
    ) as file:
        file.write(text)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def _report(row: Row) -> Row:
    """Print the row's number of yeses to stderr."""
    yes = sum(answer.ok for answer in row.answers.values())
    print(f"{row.name}: {yes} of {len(row.answers)}", file=sys.stderr)
    return row


if __name__ == "__main__":
    main()
