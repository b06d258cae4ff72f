"""Read docs/architectures.md, so that the tests can compare it with what they measure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).parents[2] / "docs" / "architectures.md"


@dataclass(frozen=True)
class Page:
    transformers_version: str
    columns: tuple[str, ...]
    rows: dict[str, tuple[bool, ...]]
    reasons: dict[int, str]
    notes: dict[str, tuple[int | None, ...]]

    def says(self, name: str, column: str) -> bool:
        return name in self.rows and self.rows[name][self.columns.index(column)]

    def count(self, column: str) -> int:
        """How many types have it, without variants."""
        return sum(self.says(name, column) for name in self.rows if "+" not in name)


def read(file: Path) -> Page:
    text = file.read_text()
    lines = text.splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith("| type |"))
    columns, *table = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in lines[start:]
        if line.startswith("| ")
    ]
    numbered = (line.partition(". ") for line in lines[start:] if line[:1].isdigit())
    return Page(
        transformers_version=text.partition("transformers ")[2].split()[0],
        columns=tuple(columns[1:]),
        rows={name: tuple(cell.startswith("✓") for cell in cells) for name, *cells in table},
        reasons={int(number): reason for number, _, reason in numbered},
        notes={name: tuple(map(_note, cells)) for name, *cells in table},
    )


def _note(cell: str) -> int | None:
    number = cell.partition(" ")[2]
    return int(number) if number else None


PAGE = read(FILE)
