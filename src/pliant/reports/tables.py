"""Tables: wrapped to the width of a terminal; in a pipe, one plain line per row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Table:
    """Cells are text; `right` names the headings of right-aligned columns."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    right: frozenset[str] = frozenset()
    # Colours by cell text, on a terminal: {"yes": "green"}.
    colours: dict[str, str] | None = None
    # How many rows come first; a page folds the others, and a terminal leaves them to the page.
    shown: int | None = None

    def __post_init__(self) -> None:
        for row in self.rows:
            assert len(row) == len(self.head), f"{row} does not fit under {self.head}"

    def draw(self, console: Console) -> None:
        if console.is_terminal:
            self._draw_on_terminal(console)
        else:
            console.print("\n".join(self._lines()), soft_wrap=True, markup=False, end="\n\n")

    @property
    def first(self) -> Sequence[Sequence[str]]:
        """The rows that are not folded."""
        return self.rows[: self.shown]

    @property
    def note(self) -> str:
        """Where the folded rows are; empty if there are none."""
        folded = len(self.rows) - len(self.first)
        return f"... and {folded} more on the page" if folded else ""

    def _draw_on_terminal(self, console: Console) -> None:
        from rich import box
        from rich.table import Table as Drawn
        from rich.text import Text

        drawn = Drawn(
            title=Text(self.title, style="bold"),
            title_justify="left",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
        )
        for column, name in enumerate(self.head):
            longest = max((len(row[column]) for row in self.first), default=0)
            drawn.add_column(
                name,
                justify="right" if name in self.right else "left",
                # Short columns keep their width; long ones share the rest and wrap.
                no_wrap=longest <= 16,
            )
        colours = self.colours or {}
        for row in self.first:
            drawn.add_row(*(Text(cell, style=colours.get(cell, "")) for cell in row))
        console.print(drawn)
        if self.note:
            console.print(Text(f"{self.note}\n", style="dim"))

    def _lines(self) -> list[str]:
        widths = [max(map(len, column)) for column in zip(self.head, *self.first, strict=True)]
        lines = [self.title, *(self._line(row, widths) for row in (self.head, *self.first))]
        return [*lines, self.note] if self.note else lines

    def _line(self, row: Sequence[str], widths: Sequence[int]) -> str:
        cells = (
            cell.rjust(width) if name in self.right else cell.ljust(width)
            for name, cell, width in zip(self.head, row, widths, strict=True)
        )
        return "  ".join(cells).rstrip()


def count(number: float) -> str:
    """A count in about three figures: 812, 4.06k, 1.24M, 70.6B."""
    return _scaled(number, ("", "k", "M", "B", "T"))


def size(octets: float) -> str:
    """A number of bytes: 812 B, 4.1 KB, 1.2 MB, 140 GB (powers of 1000)."""
    return _scaled(octets, (" B", " KB", " MB", " GB", " TB"))


def _scaled(number: float, units: Sequence[str]) -> str:
    for thousands in range(len(units) - 1, 0, -1):
        scale = 1e3**thousands
        if abs(number) >= 0.9995 * scale:
            figure = number / scale
            decimals = 0 if abs(figure) >= 99.95 else 1 if abs(figure) >= 9.995 else 2
            return f"{figure:.{decimals}f}{units[thousands]}"
    return f"{number:,.0f}{units[0]}"
