"""A page is one file that opens anywhere: whole or not at all, safe, and legible in the dark."""

import re

import pytest

from pliant.reports import page, plots
from pliant.reports.page import Section, render, write
from pliant.reports.tables import Table

SECTION = Section(
    "What <it> says",
    sentences=["a & b"],
    tables=[Table("figures", ["what", "n"], [["a word", "1"], ["a sentence of some length", "2"]])],
    pictures=[
        (plots.bars(["1", "2"], {"a": [0.1, 0.2], "b": [0.3, 0.4]}, "x", "y"), 'bars & "bars"'),
        (plots.curve({"line": [(0, 0), (1, 1)]}, {"end": (1, 1)}, "x", "y"), "a line"),
    ],
)


def test_a_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "new" / "page.html"
    assert write(file, "first", [SECTION]) == file.resolve()
    before = file.read_text()

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(page, "render", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(file, "second", [SECTION])
    assert file.read_text() == before
    assert list(file.parent.iterdir()) == [file]


def test_nothing_is_fetched_and_all_text_is_escaped():
    html = render("<t>", [SECTION])
    assert all(a.startswith("#") for a in re.findall(r'(?:href|src)="([^"]*)"', html))
    assert "url(http" not in html and "@import" not in html and "<script" not in html
    assert "What &lt;it&gt; says" in html and "a &amp; b" in html and "&lt;t&gt;" in html


def test_every_picture_is_told_to_those_who_do_not_see_it():
    html = render("t", [SECTION])
    assert html.count('role="img"') == html.count("<svg") == 2
    assert 'aria-label="bars &amp; &quot;bars&quot;"' in html and 'aria-label="a line"' in html


def test_what_is_black_in_a_picture_takes_the_colour_of_the_page():
    """Every colour is one of the series or the ink, and the page has a rule for the ink."""
    for svg, _ in SECTION.pictures:
        assert set(re.findall(r"#[0-9a-f]{6}\b", svg)) <= {plots.INK, *plots.COLOURS}
        assert "fill: #ffffff" not in svg and "background" not in svg
    assert f"stroke: {plots.INK}" in page._STYLE and f"fill: {plots.INK}" in page._STYLE


def test_short_cells_stay_on_one_line_and_long_ones_may_wrap():
    html = render("t", [SECTION])
    assert '<td class="short">a word</td>' in html
    assert "<td>a sentence of some length</td>" in html
