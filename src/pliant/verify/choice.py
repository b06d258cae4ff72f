"""The verifier for questions of multiple choice: which letter does an answer name?"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

from pliant.errors import InvalidInput
from pliant.verify.text import as_text, references

# What can follow a choice in a sentence, so that "A" or "I" is a choice and not a word.
_AFTER = r"(?=\s*(?:$|[^\w\s'’]|\n|(?:because|since|as|for|and|but|is|was|which|due|given|so)\b))"
_LETTER = (
    r"(?:\(\s*(?P<bracketed>[A-Za-z])\s*\)|(?P<plain>"
    rf"[B-HJ-Z](?![\w'’])|[AI](?![\w'’]){_AFTER}|[a-z](?![\w'’])(?=\W*$)))"
)
_MARKED = re.compile(
    r"(?i:\banswer|\boption|\bchoice|\bchoose|\bpick|\\boxed)\W{0,8}"
    rf"(?:(?i:is|was|would\sbe|option|choice)\b\W{{1,8}})*{_LETTER}"
)
_ALONE = re.compile(r"\W*(?P<plain>[A-Za-z])\W*")
_FIRST = re.compile(r"[\W_]*?(?:\((?P<bracketed>[A-Za-z])\)|(?P<plain>[A-Za-z])[.):\]*]+)(?=\s|$)")
_ANYWHERE = re.compile(rf"(?<![\w'’.-]){_LETTER}")


@dataclass(frozen=True)
class Choice:
    """The answer names the reference's letter: "B", "(b)", "B) Paris", "The answer is B because".

    In this order, it looks for a letter alone; a letter at the beginning, in brackets or before a
    punctuation mark; the last letter after the word answer, option or choice; and a capital or
    bracketed letter anywhere, if there is only one. "A" and "I" count only where they cannot be
    words. A reference that is a number is an index, counted from 0.
    """

    name: ClassVar[str] = "choice"
    letters: str = "ABCDEFGHIJ"

    def __post_init__(self) -> None:
        if not (self.letters.isascii() and self.letters.isalpha() and self.letters.isupper()):
            raise InvalidInput(f"choice: letters={self.letters!r}: give capital letters like ABCD")

    def __call__(self, answer: str, reference: Any, prompt: str | None = None) -> float:
        right = {self._reference(x) for x in references(reference)}
        return float(self.chosen(as_text(answer)) in right)

    def chosen(self, answer: str) -> str | None:
        """The letter that an answer names, if it names one."""
        answer = answer.strip()
        for match in (_ALONE.fullmatch(answer), _FIRST.match(answer)):
            if match and self._letter(match):
                return self._letter(match)
        marked = [self._letter(m) for m in _MARKED.finditer(answer)]
        if any(marked):
            return [letter for letter in marked if letter][-1]
        anywhere = {self._letter(m) for m in _ANYWHERE.finditer(answer)} - {None}
        return anywhere.pop() if len(anywhere) == 1 else None

    def _letter(self, match: re.Match[str]) -> str | None:
        part = match.groupdict()
        letter = (part.get("bracketed") or part.get("plain") or "").upper()
        return letter if letter and letter in self.letters else None

    def _reference(self, reference: Any) -> str:
        if isinstance(reference, int) and not isinstance(reference, bool):
            if 0 <= reference < len(self.letters):
                return self.letters[reference]
        else:
            letter = self.chosen(as_text(reference))
            if letter:
                return letter
        raise InvalidInput(f"choice: the reference {reference!r} is none of {self.letters}")
