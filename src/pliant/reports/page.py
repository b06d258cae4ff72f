"""One self-contained HTML page: a verdict, its figures, and sections of sentences, tables and
pictures. It needs no network, and follows the reader's light or dark mode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pliant.errors import InvalidInput
from pliant.reports.palette import themed, variables
from pliant.reports.tables import Table

if TYPE_CHECKING:
    from rich.console import Console

START = "<!doctype html>"
_SHORT = 24  # letters: cells up to this length, such as a figure and its interval, do not wrap


@dataclass(frozen=True)
class Section:
    """A section of the page. `pictures` are SVG documents, each with its caption."""

    title: str
    sentences: Sequence[str] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[tuple[str, str]] = ()
    texts: Sequence[Coloured] = ()


@dataclass(frozen=True)
class KeyFigure:
    """A figure at the top of the page, such as 87 % of the cost."""

    label: str
    value: str
    note: str = ""
    """Its interval, or what it is compared with."""


@dataclass(frozen=True)
class Verdict:
    """The finding of the page in one sentence, and what to do now."""

    kind: Literal["good", "mixed", "bad"]
    sentence: str
    action: str = ""


@dataclass(frozen=True)
class Top:
    """What comes before the sections, and the seed for the footer."""

    verdict: Verdict | None = None
    figures: Sequence[KeyFigure] = ()
    seed: int | None = None


def check_writable(path: Path) -> None:
    """Raise an error, before the work begins, if no page can be written there."""
    from pliant import files

    if path.is_dir():
        raise InvalidInput(f"{path} is a folder; name the page, as in {path / 'report.html'}")
    files.check_writable(path)
    files.check_ours(path, START.encode())


def write(path: Path, title: str, sections: Sequence[Section], top: Top | None = None) -> Path:
    """Write the page, completely or not at all; returns its path."""
    from pliant.files import write_file

    check_writable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, render(title, sections, top).encode())
    return path.resolve()


def render(title: str, sections: Sequence[Section], top: Top | None = None) -> str:
    top = top or Top()
    sections = [section for section in sections if section != Section(section.title)]
    verdict_sentence = (
        "" if top.verdict is None else top.verdict.sentence
    )  # at the top, and not again
    numbered = enumerate(sections, start=1)
    body = "\n".join(_section(section, i, verdict_sentence) for i, section in numbered)
    return f"""{START}
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
{_top(top)}
{_contents(sections)}
{body}
{_footer(top.seed)}
</main>
</body>
</html>
"""


def _top(top: Top) -> str:
    parts = []
    if top.verdict is not None:
        action = f"<br>{escape(top.verdict.action)}" if top.verdict.action else ""
        sentence = f"<strong>{escape(top.verdict.sentence)}</strong>{action}"
        parts.append(f'<p class="verdict {top.verdict.kind}">{sentence}</p>')
    if top.figures:
        cells = "".join(
            f"<div><dt>{escape(each.label)}</dt><dd>{escape(each.value)}</dd>"
            f'<dd class="note">{escape(each.note)}</dd></div>'
            for each in top.figures
        )
        parts.append(f'<dl class="figures">{cells}</dl>')
    return "\n".join(parts)


def _contents(sections: Sequence[Section]) -> str:
    """Links to the sections, where there are several."""
    if len(sections) < 3:
        return ""
    links = "".join(
        f'<li><a href="#section-{i}">{escape(section.title)}</a></li>'
        for i, section in enumerate(sections, start=1)
    )
    return f'<nav aria-label="Contents"><ol>{links}</ol></nav>'


def _footer(seed: int | None) -> str:
    """What made the page: no names of machines or people."""
    import datetime
    import os
    import platform

    from pliant import __version__

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    machine = f"{platform.machine()}, {cores} CPU core{'s' * (cores != 1)}"
    parts = [f"Pliant {__version__}", *([] if seed is None else [f"seed {seed}"]), machine]
    return f"<footer>{escape(' · '.join(parts))} · {datetime.date.today()}</footer>"


def _section(section: Section, number: int, verdict_sentence: str) -> str:
    parts = [f'<h2 id="section-{number}">{escape(section.title)}</h2>']
    sentences = [each for each in section.sentences if each != verdict_sentence]
    parts += [f"<p>{escape(each)}</p>" for each in sentences]
    parts += [_picture(svg, caption) for svg, caption in section.pictures]
    parts += [_table(table) for table in section.tables]
    parts += [text.html() for text in section.texts]
    return "<section>\n" + "\n".join(parts) + "\n</section>"


def _picture(svg: str, caption: str) -> str:
    drawing = themed(svg[svg.index("<svg") :])  # without the XML prologue, which is not HTML
    drawing = drawing.replace("<svg", f'<svg role="img" aria-label="{escape(caption)}"', 1)
    return f"<figure>{drawing}<figcaption>{escape(caption)}</figcaption></figure>"


def _table(table: Table) -> str:
    def cell(tag: str, name: str, text: str) -> str:
        classes = ["right"] * (name in table.right) + ["short"] * (len(text) <= _SHORT)
        style = f' class="{" ".join(classes)}"' if classes else ""
        colour = (table.colours or {}).get(text, "")
        inside = f'<span class="{escape(colour)}">{escape(text)}</span>' if colour else escape(text)
        return f"<{tag}{style}>{inside}</{tag}>"

    def rows(of: Sequence[Sequence[str]]) -> str:
        lines = (
            "".join(cell("td", name, text) for name, text in zip(table.head, row, strict=True))
            for row in of
        )
        return "\n".join(f"<tr>{line}</tr>" for line in lines)

    def drawn(of: Sequence[Sequence[str]]) -> str:
        return (
            f'<div class="table"><table aria-label="{escape(table.title)}">'
            f"<thead><tr>{head}</tr></thead>\n<tbody>{rows(of)}</tbody></table></div>"
        )

    head = "".join(cell("th", name, name) for name in table.head)
    folded = table.rows[len(table.first) :]
    more = f"<details><summary>{len(folded)} more</summary>{drawn(folded)}</details>"
    return f"<h3>{escape(table.title)}</h3>\n{drawn(table.first)}" + (more if folded else "")


# --- coloured text -------------------------------------------------------------------------------

Kind = Literal["marked", "plain", "faint"]
SHADES = ("black on #b7e4c7", "black on #74c69d", "white on #2d6a4f")
"""From weak to strong."""


@dataclass(frozen=True)
class Word:
    """A piece of text in one style, such as a token."""

    text: str
    kind: Kind = "plain"
    strength: float = 1.0
    """How strongly it is marked, from 0 to 1."""
    tooltip: str = ""
    """What a page shows while the pointer is over it."""


@dataclass(frozen=True)
class Coloured:
    """A title and a text of such words."""

    title: str
    words: Sequence[Word]

    def draw(self, console: Console) -> None:
        from rich.text import Text

        if console.is_terminal:
            console.print(Text(self.title, style="bold"))
            console.print(Text.assemble(*((w.text, _style(w)) for w in self.words)), end="\n\n")
        else:
            console.print(Text(f"{self.title}\n{self.plain()}\n"), soft_wrap=True)

    def plain(self) -> str:
        """The text, with marked words in brackets."""
        return "".join(f"[{w.text}]" if w.kind == "marked" else w.text for w in self.words)

    def html(self) -> str:
        words = "".join(_span(word) for word in self.words)
        return f'<h3>{escape(self.title)}</h3>\n<p class="coloured">{words}</p>'


def _style(word: Word) -> str:
    if word.kind == "marked":
        return SHADES[min(len(SHADES) - 1, int(word.strength * len(SHADES)))]
    return "dim" if word.kind == "faint" else ""


def _span(word: Word) -> str:
    tooltip = f' title="{escape(word.tooltip)}"' if word.tooltip else ""
    style = ""
    if word.kind == "marked":
        style = f' style="--strength: {15 + round(40 * min(1.0, max(0.0, word.strength)))}%"'
    return f'<span class="{word.kind}"{style}{tooltip}>{escape(word.text)}</span>'


# --- style ---------------------------------------------------------------------------------------

_STYLE = (
    f"""
:root {{ color-scheme: light dark; --ink: #1b1f24; --soft: #667085; --line: #d9dee5;
  --paper: #ffffff; {variables(0)} }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #e6e9ee; --soft: #98a2b3;
  --line: #333a45; --paper: #14171c; {variables(1)} }} }}
"""
    + """
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 54rem; margin: 0 auto; padding: 2.5rem 1.25rem 3rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 1.5rem; }
h2 { font-size: 1.25rem; margin: 2.75rem 0 .5rem; }
p { max-width: 46rem; margin: .5rem 0; }
.verdict { max-width: none; padding: .8rem 1rem; border-left: 5px solid var(--verdict);
  border-radius: 4px; background: color-mix(in srgb, var(--verdict) 12%, transparent); }
.verdict.good { --verdict: var(--good); } .verdict.bad { --verdict: var(--bad); }
.verdict.mixed { --verdict: var(--rival); }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr));
  gap: .75rem; margin: 1rem 0; }
.figures div { border: 1px solid var(--line); border-radius: 8px; padding: .7rem .9rem; }
.figures dt { color: var(--soft); font-size: .85rem; }
.figures dd { margin: 0; font-size: 1.55rem; font-weight: 650; line-height: 1.3;
  font-variant-numeric: tabular-nums; }
.figures dd.note { font-size: .82rem; font-weight: 400; color: var(--soft); }
nav ol { columns: 2; margin: 1.25rem 0 0; padding-left: 1.3rem; font-size: .92rem; }
@media (max-width: 40rem) { nav ol { columns: 1; } }
a { color: var(--ours); }
figure { margin: 1.25rem 0; border: 1px solid var(--line); border-radius: 8px; padding: .75rem; }
figure svg { width: 100%; height: auto; display: block; fill: currentColor; }
figcaption { color: var(--soft); font-size: .85rem; margin-top: .5rem; }
.table { overflow-x: auto; margin: 0 0 1.25rem; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
h3 { font-size: .92rem; margin: 1.5rem 0 .3rem; }
th, td { text-align: left; padding: .35rem .9rem .35rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th { color: var(--soft); font-weight: 600; }
td { overflow-wrap: anywhere; min-width: 8rem; }
.short { white-space: nowrap; min-width: 0; }
@media (max-width: 30rem) { table { font-size: .85rem; } th, td { padding-right: .55rem; } }
.right { text-align: right; }
.green { color: var(--good); } .red { color: var(--bad); }
details { margin: -.75rem 0 1.25rem; } summary { cursor: pointer; color: var(--ours); }
footer { margin-top: 3rem; padding-top: .75rem; border-top: 1px solid var(--line);
  color: var(--soft); font-size: .85rem; }
.coloured { white-space: pre-wrap; overflow-wrap: anywhere; max-width: none; line-height: 1.9;
  font-family: ui-monospace, "SFMono-Regular", Menlo, Consolas, monospace; font-size: .88rem; }
.coloured .marked { background: color-mix(in srgb, var(--ours) var(--strength), transparent);
  border-bottom: 2px solid var(--ours); border-radius: 3px 3px 0 0; padding: .12em 0; }
.coloured .faint { color: var(--soft); }
"""
)
