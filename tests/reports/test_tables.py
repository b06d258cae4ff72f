"""Tables fit a terminal, are plain in a pipe, and their figures are short and right."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from pliant.reports.tables import Table, count, size

TABLE = Table(
    "What it can do",
    ["part", "can", "why"],
    [["gates", "yes", ""], ["experts", "no", "there is nothing to turn in a layer like this " * 3]],
    colours={"yes": "green"},
)


def drawn(table: Table, **console: object) -> str:
    out = io.StringIO()
    table.draw(Console(file=out, width=80, **console))  # type: ignore[arg-type]
    return out.getvalue()


def test_in_a_pipe_a_row_is_one_plain_line() -> None:
    lines = drawn(TABLE).rstrip().splitlines()
    assert lines[:3] == ["What it can do", "part     can  why", "gates    yes"]
    assert len(lines) == 4
    assert "\x1b" not in drawn(TABLE)


def test_rows_after_the_first_are_left_to_the_page() -> None:
    table = Table("Questions", ["a question"], [["short"], ["a longer one"], ["3"]], shown=1)
    for way in ({}, {"force_terminal": True, "color_system": None}):
        text = drawn(table, **way)
        assert "short" in text and "a longer" not in text and "... and 2 more on the page" in text
    assert "on the page" not in drawn(Table("Questions", ["a question"], [["short"]], shown=1))


def test_on_a_terminal_no_line_is_wider_than_it() -> None:
    text = drawn(TABLE, force_terminal=True, no_color=True, color_system=None)
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("layer like this") == 3


def test_square_brackets_are_text_not_markup() -> None:
    table = Table("[red]t[/red]", ["[b]"], [["[bold]x"], ["[/]"]])
    for way in ({}, {"force_terminal": True, "color_system": None}):
        text = drawn(table, **way)
        assert "[bold]x" in text
        assert "[/]" in text


@pytest.mark.parametrize(
    ("number", "said"),
    [(0, "0"), (812, "812"), (4060, "4.06k"), (999_999, "1.00M"), (7.06e10, "70.6B")],
)
def test_a_count_has_three_figures(number: float, said: str) -> None:
    assert count(number) == said


@pytest.mark.parametrize(
    ("octets", "said"), [(0, "0 B"), (999, "999 B"), (4096, "4.10 KB"), (1.4e11, "140 GB")]
)
def test_a_size_has_three_figures(octets: float, said: str) -> None:
    assert size(octets) == said


@given(st.integers(min_value=1, max_value=10**14))
def test_what_a_count_says_is_within_one_percent(number: int) -> None:
    said = count(number)
    scale = {"k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
    back = float(said.rstrip("kMBT")) * scale.get(said[-1], 1)
    assert abs(back - number) <= 0.01 * number
