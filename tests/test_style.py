"""The style of the source that a machine can count: plain words, files of one whole idea."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "pliant"
PRIVATE_WORDS = {"found", "said", "told", "kept", "far"}
"""Other libraries say `predictions`, `message`, `reported`, `checkpoint`, `novel`: the noun."""
MOST = 8  # private words in 1,000 lines
LONGEST = 400  # lines of a file


def test_the_source_uses_plain_words() -> None:
    texts = {str(p.relative_to(SOURCE)): p.read_text("utf-8") for p in SOURCE.rglob("*.py")}
    counts = Counter({name: private_words(text) for name, text in texts.items()})
    lines = sum(text.count("\n") for text in texts.values())
    share = 1000 * counts.total() / lines
    assert share <= MOST, f"{share:.1f} in 1,000 lines, most in {counts.most_common(5)}"


def test_no_file_is_too_long() -> None:
    lengths = {path: path.read_text("utf-8").count("\n") for path in SOURCE.rglob("*.py")}
    assert {str(path): n for path, n in lengths.items() if n > LONGEST} == {}


def test_private_words_are_counted_in_prose_and_in_names() -> None:
    assert private_words("# what was found\nkeptRows = was_told(far_away)\n") == 4
    assert private_words("# foundation, profound, a founder of farms\n") == 0


def private_words(text: str) -> int:
    """How many words of a text, and parts of its names, are private language."""
    words = re.findall(r"[A-Za-z]+", re.sub(r"([a-z])([A-Z])", r"\1 \2", text))
    return sum(word.lower() in PRIVATE_WORDS for word in words)
