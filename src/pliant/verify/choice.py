"""The verifier for questions of multiple choice: which letter does an answer name?"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

from pliant.errors import InvalidInput
from pliant.verify.reference import as_text, each

# Where "A" or "I" is a choice and no word: what can follow a choice in a sentence.
_AFTER = r"(?=\s*(?:$|[^\w\s'’]|\n|(?:because|since|as|for|and|but|is|was|which|due|given|so)\b))"
_LETTER = (
    r"(?:\(\s*(?P<bracketed>[A-Za-z])\s*\)|(?P<plain>"
    rf"[B-HJ-Z](?![\w'’])|[AI](?![\w'’]){_AFTER}|[a-z](?![\w'’])(?=\W*$)))"
)
_MARKED = re.compile(
    r"(?i:\banswer|\boption|\bchoice|\bchoose|\bpick|\\boxed)\W{0,8}"
    rf"(?:(?i:is|was|would\sbe|option|choice)\b\W{{1,8}})*{_LETTER}"
)
_WHOLE = re.compile(r"\W*(?P<plain>[A-Za-z])\W*")
_FIRST = re.compile(r"[\W_]*?(?:\((?P<bracketed>[A-Za-z])\)|(?P<plain>[A-Za-z])[.):\]*]+)(?=\s|$)")
_ANYWHERE = re.compile(rf"(?<![\w'’.-]){_LETTER}")


@dataclass(frozen=True)
class Choice:
    """The answer names the reference's letter: "B", "(b)", "B) Paris", "The answer is B because".

    Looked for are, in this order: a letter alone; one that the text begins with, in brackets or
    followed by a mark; the last one after the word answer, option or choice; and a capital or
    bracketed letter anywhere, if there is no second one. "A" and "I" count only where they cannot
    be words. A reference that is a number is an index that counts from 0.
    """

    name: ClassVar[str] = "choice"
    letters: str = "ABCDEFGHIJ"

    def __post_init__(self) -> None:
        if not (self.letters.isascii() and self.letters.isalpha() and self.letters.isupper()):
            raise InvalidInput(f"choice: letters={self.letters!r}: capital letters, such as ABCD")

    def __call__(self, answer: str, reference: Any, prompt: str | None = None) -> float:
        wanted = {self._reference(x) for x in each(reference)}
        return float(self.chosen(as_text(answer)) in wanted)

    def chosen(self, answer: str) -> str | None:
        """The letter that an answer names, if it names one."""
        answer = answer.strip()
        for found in (_WHOLE.fullmatch(answer), _FIRST.match(answer)):
            if found and self._letter(found):
                return self._letter(found)
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
