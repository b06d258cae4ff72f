"""A page is one file that opens anywhere: whole or not at all, safe, and legible in the dark."""

import platform
import re
from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

import pliant
from pliant.reports import page, palette, plots
from pliant.reports.page import (
    SHADES,
    Coloured,
    KeyFigure,
    Section,
    Top,
    Verdict,
    Word,
    render,
    write,
)
from pliant.reports.tables import Table

LINES = plots.lines(
    {
        "main": plots.Line([0, 1], [0, 1], [-0.1, 0.9], [0.1, 1.1]),
        **{f"other {i}": plots.Line([0, 1], [i, 1], role="control") for i in range(9)},
    },
    "x",
    "y",
    {"cheap": (0, 0), "expensive": (1, 1)},
    ("$1 or $2", (0.5, 0.5)),
)
HEAT = plots.heat_maps(
    {"heads": {"0": [1e-3, 2.0, 30.0], "1": [0.5]}, "layers": {"0": [-1], "1": [0]}}, "layer", "z"
)
SECTION = Section(
    "What <it> says",
    sentences=["a & b"],
    tables=[Table("figures", ["what", "n"], [["a word", "1"], ["a sentence of some length", "2"]])],
    pictures=[
        (plots.bars(["1", "2"], {"a": [0.1, 0.2]}, {"a": "ours"}, "x", "y"), 'bars & "bars"'),
        (plots.lines({"line": plots.Line.through([(0, 0), (1, 1)])}, "x", "y"), "a line"),
        (LINES, "many lines"),
        (plots.reliability([(0.2, 0.1, 5), (0.2, 0.3, 5), (0.9, 1, 10)], "x", "y"), "kept"),
        (plots.histograms([0, 0.5, 1], {"a": [1, 2], "b": [3, 0]}, {}, "x", "y"), "two of them"),
        (plots.lines({"a": plots.Line([0, 1], [1, 0], [0, 0], [1, 1])}, "x", "y"), "a band"),
        (HEAT, "two heat maps"),
    ],
    texts=[Coloured("a <text>", [Word("<b>", "marked", 0.5, 'says "so"'), Word(" & ", "faint")])],
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
    local = ("#", "data:image/png;base64,")  # a heat map's cells are an image in the page itself
    assert all(a.startswith(local) for a in re.findall(r'(?:href|src)="([^"]*)"', html))
    assert "url(http" not in html and "@import" not in html and "<script" not in html
    assert "What &lt;it&gt; says" in html and "a &amp; b" in html and "&lt;t&gt;" in html


def test_every_picture_is_told_to_those_who_do_not_see_it():
    html = render("t", [SECTION])
    assert html.count('role="img"') == html.count("<svg") == len(SECTION.pictures)
    assert 'aria-label="bars &amp; &quot;bars&quot;"' in html and 'aria-label="a line"' in html


def test_every_colour_of_a_picture_follows_the_mode_of_the_page():
    """Alone a picture has a role's light colour or ink; on a page these are variables."""
    light = {pair[0] for pair in palette.COLOURS.values()}
    for svg, _ in SECTION.pictures:
        assert set(re.findall(r"#[0-9a-f]{6}\b", svg)) <= {palette.INK, *light}
        assert "fill: #ffffff" not in svg and "background" not in svg
    html = render("t", [SECTION])
    pictures = "".join(re.findall(r"<figure>.*?</figure>", html, re.DOTALL))
    assert not re.findall(r"#[0-9a-f]{6}\b", pictures)
    used = set(re.findall(r"var\(--([a-z]+)\)", pictures))
    assert {"ours", "control", "ink"} <= used
    for name in used:
        assert html.count(f"--{name}: #") == 2, name  # for light and for dark mode


def test_no_two_colours_mean_the_same_in_either_mode():
    for mode in (0, 1):
        shades = [pair[mode] for pair in palette.COLOURS.values()]
        assert len(set(shades)) == len(shades)


def test_pictures_are_as_wide_as_each_other_and_their_axes_begin_at_zero():
    widths = {re.search(r'width="([^"]+)"', svg)[1] for svg, _ in SECTION.pictures}
    assert len(widths) == 1
    high = plots.lines({"a": plots.Line([0.6, 0.9], [0.90, 0.95])}, "x", "y")
    assert high.count(">0.0<") == 2
    below = plots.lines({"a": plots.Line([0.6, 0.9], [-0.1, 0.95])}, "x", "y")
    assert below.count(">0.0<") == 2  # and what is negative is drawn, too
    bands = plots.intervals({"a": (0.8, 0.7, 0.9)}, {}, "x")
    assert ">0.0<" in bands


def test_the_top_of_a_page_is_its_verdict_its_figures_and_its_contents():
    figures = [KeyFigure("quality", "98 %", "of <large>'s")]
    verdict = Verdict("mixed", "Saves 3 %.", "More labels & more.")
    html = render("t", [SECTION] * 3, Top(verdict, figures, seed=7))
    assert '<p class="verdict mixed"><strong>Saves 3 %.</strong><br>More labels &amp; more.' in html
    assert "<dt>quality</dt><dd>98 %</dd>" in html and "of &lt;large&gt;" in html
    assert [html.count(f'href="#section-{i}"') for i in (1, 2, 3, 4)] == [1, 1, 1, 0]
    assert html.index("verdict mixed") < html.index("quality") < html.index("<nav")
    footer = html[html.index("<footer>") :]
    assert f"Pliant {pliant.__version__} · seed 7 · " in footer and "CPU core" in footer
    assert platform.node() not in footer
    assert "<nav" not in render("t", [SECTION])
    again = Section("s", ["Saves 3 %.", "And more."])
    assert render("t", [again], Top(verdict)).count("Saves 3 %.") == 1


def test_rows_after_the_first_are_folded():
    table = Table("t", ["n"], [["one"], ["two"], ["three"]], shown=1)
    html = render("t", [Section("s", tables=[table])])
    assert html.index("one") < html.index("<summary>2 more</summary>") < html.index("three")
    assert "<details" not in render("t", [Section("s", tables=[replace(table, shown=3)])])


def test_a_heat_map_has_a_row_for_each_name_and_sorts_long_rows():
    assert all(f">{text}<" in HEAT for text in ("heads", "layers", "layer", "z", "unit"))
    assert "highest" not in HEAT and "mathdefault" not in HEAT
    long = plots.heat_maps({"channels": {"0": [float(i % 7) for i in range(200)]}}, "layer", "z")
    assert ">unit, the highest of each row first<" in long


def test_no_two_lines_look_alike_and_names_are_no_formulas():
    drawn = re.findall(r'<path d="[^"]*" clip-path="[^"]*" style="(fill: none; [^"]*)"/>', LINES)
    others = [style for style in drawn if "stroke-dasharray" in style]
    assert len(others) == len(set(others)) == 9
    assert "$1 or $2" in LINES and all(f">other {i}<" in LINES for i in range(9))


def test_what_is_counted_has_no_halves_on_its_axis():
    counted = plots.lines({"a": plots.Line([1, 2, 3], [0, 5, 0])}, "x", "y")
    measured = plots.lines({"a": plots.Line([1.0, 2.0, 3.0], [0, 5, 0])}, "x", "y")
    assert re.search(r">\d\.\d+<", measured) and not re.search(r">\d\.\d+<", counted)


def test_what_lies_in_one_bin_is_counted_once():
    bins = [(0.2, 0.1, 5), (0.2, 0.3, 5), (0.9, 1.0, 1_234)]
    picture = plots.reliability(bins, "x", "y")
    assert ">10<" in picture and ">1,234<" in picture and ">5<" not in picture


def test_short_cells_stay_on_one_line_and_long_ones_may_wrap():
    html = render("t", [SECTION])
    assert '<td class="short">a word</td>' in html
    assert "<td>a sentence of some length</td>" in html


# --- coloured text: what is marked is marked everywhere, by a colour, by brackets, by a style -----


TEXT = Coloured(
    "One text",
    [Word("what? ", "faint"), Word("4"), Word("2", "marked", 0.0), Word("[0]", "marked", 1.0)],
)


def drawn(**options: bool) -> str:
    out = StringIO()
    TEXT.draw(Console(file=out, width=40, color_system="truecolor", **options))
    return out.getvalue()


def test_a_pipe_has_brackets_and_no_colours() -> None:
    assert drawn(force_terminal=False) == "One text\nwhat? 4[2][[0]]\n\n"


def test_a_terminal_has_colours_and_no_brackets() -> None:
    text = drawn(force_terminal=True)
    assert "\x1b[" in text and "[2]" not in text
    weak, strong = text.index("2\x1b"), text.index("[0]")
    assert text[weak - 5 : weak] != text[strong - 5 : strong] and len(set(SHADES)) == 3


def test_a_page_says_what_a_word_says_and_escapes_it() -> None:
    html = Coloured("<t>", [Word("<b>", "marked", 0.5, 'loss "1"'), Word("&")]).html()
    assert (
        '<span class="marked" style="--strength: 35%" title="loss &quot;1&quot;">&lt;b&gt;' in html
    )
    assert '<span class="plain">&amp;</span>' in html and "&lt;t&gt;" in html


def test_a_strength_beyond_the_scale_is_the_end_of_it() -> None:
    for strength, shown in ((-1.0, 15), (0.0, 15), (1.0, 55), (7.0, 55)):
        assert f"--strength: {shown}%" in Coloured("t", [Word("a", "marked", strength)]).html()
