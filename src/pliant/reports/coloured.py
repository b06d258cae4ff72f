"""Text with coloured words, for a terminal, a pipe and a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rich.console import Console

Kind = Literal["marked", "plain", "faint"]
STYLES = {"plain": "", "faint": "dim"}
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
    if word.kind != "marked":
        return STYLES[word.kind]
    return SHADES[min(len(SHADES) - 1, int(word.strength * len(SHADES)))]


def _span(word: Word) -> str:
    tooltip = f' title="{escape(word.tooltip)}"' if word.tooltip else ""
    style = ""
    if word.kind == "marked":
        style = f' style="--strength: {15 + round(40 * min(1.0, max(0.0, word.strength)))}%"'
    return f'<span class="{word.kind}"{style}{tooltip}>{escape(word.text)}</span>'


STYLE = """
.coloured { white-space: pre-wrap; overflow-wrap: anywhere; max-width: none; line-height: 1.9;
  font-family: ui-monospace, "SFMono-Regular", Menlo, Consolas, monospace; font-size: .88rem; }
.coloured .marked { background: color-mix(in srgb, var(--good) var(--strength), transparent);
  border-bottom: 2px solid var(--good); border-radius: 3px 3px 0 0; padding: .12em 0; }
.coloured .faint { color: var(--soft); }
"""
