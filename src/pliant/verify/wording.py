"""Verifiers that compare texts: exact, contains, regex."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

from pliant.errors import InvalidInput
from pliant.verify.reference import as_text, each, folded


@dataclass(frozen=True)
class Exact:
    """The answer is the reference, white space at both ends aside."""

    name: ClassVar[str] = "exact"
    ignore_case: bool = False

    def __call__(self, answer: str, reference: Any, prompt: str | None = None) -> float:
        said = folded(answer, self.ignore_case)
        return float(any(said == folded(x, self.ignore_case) for x in each(reference)))


@dataclass(frozen=True)
class Contains:
    """The reference stands somewhere in the answer; each run of white space counts as one space."""

    name: ClassVar[str] = "contains"
    ignore_case: bool = True
    whole_words: bool = True
    """Whether "12" is not found in "123"."""

    def __call__(self, answer: str, reference: Any, prompt: str | None = None) -> float:
        said = " ".join(folded(answer, self.ignore_case).split())
        return float(any(self._found(as_text(x), said) for x in each(reference)))

    def _found(self, wanted: str, said: str) -> bool:
        wanted = " ".join(folded(wanted, self.ignore_case).split())
        if not wanted:
            raise InvalidInput("contains: the reference is empty, and every answer contains that")
        if not self.whole_words:
            return wanted in said
        return re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", said) is not None


@dataclass(frozen=True)
class Regex:
    """The answer matches: the reference is a pattern, to be found in it.

    Or `pattern` is one, and the first group of its last match (the whole of it, where it has no
    group) is the reference, white space at both ends aside.
    """

    name: ClassVar[str] = "regex"
    pattern: str | None = None
    ignore_case: bool = False

    def __post_init__(self) -> None:
        if self.pattern is not None:
            self._compiled(self.pattern)

    def __call__(self, answer: str, reference: Any, prompt: str | None = None) -> float:
        said = as_text(answer)
        if self.pattern is None:
            return float(any(self._compiled(as_text(x)).search(said) for x in each(reference)))
        matches = list(self._compiled(self.pattern).finditer(said))
        if not matches:
            return 0.0
        last = matches[-1]
        taken = last[1] if last.re.groups else last[0]
        return Exact(self.ignore_case)(taken or "", reference)

    def _compiled(self, pattern: str) -> re.Pattern[str]:
        try:
            return re.compile(pattern, re.IGNORECASE if self.ignore_case else 0)
        except re.error as error:
            raise InvalidInput(f"regex: {pattern!r} is no pattern ({error})") from error
