"""`python -m pliant.survey docs/architectures.md`: ask every architecture, and write the page."""

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
    write(parser.parse_args().page, page(list(map(_told, rows()))))


def write(path: Path, text: str) -> None:
    """The whole text or nothing: under another name first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, prefix=path.name, delete=False
    ) as file:
        file.write(text)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def _told(row: Row) -> Row:
    """Say how it went, in passing."""
    yes = sum(answer.ok for answer in row.answers.values())
    print(f"{row.name}: {yes} of {len(row.answers)}", file=sys.stderr)
    return row


if __name__ == "__main__":
    main()
