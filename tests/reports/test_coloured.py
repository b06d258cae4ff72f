"""What is marked is marked everywhere: by a colour, by brackets, by a style."""

from __future__ import annotations

from io import StringIO

from rich.console import Console

from pliant.reports.coloured import SHADES, Coloured, Word

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
