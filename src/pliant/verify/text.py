"""Verifiers that read a text (exact, contains, regex, choice, numeric), and how they do it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

from pliant.errors import InvalidInput


def references(reference: Any) -> list[Any]:
    """The references as a list, also if there is only one."""
    listed = list(reference) if isinstance(reference, (list, tuple)) else [reference]
    if not listed or any(x is None for x in listed):
        raise InvalidInput(f"there is no reference ({reference!r})")
    return listed


def as_text(value: Any) -> str:
    """A missing answer is an empty one."""
    return "" if value is None else str(value)


def normalised(value: Any, ignore_case: bool) -> str:
    """Without white space at either end, and case-folded if case does not matter."""
    text = as_text(value).strip()
    return text.casefold() if ignore_case else text


@dataclass(frozen=True)
class Exact:
    """The answer equals the reference, except for white space at either end."""

    name: ClassVar[str] = "exact"
    ignore_case: bool = False

    def __call__(self, answer: str, reference: Any, prompt: str | None = None) -> float:
        text = normalised(answer, self.ignore_case)
        return float(any(text == normalised(x, self.ignore_case) for x in references(reference)))


@dataclass(frozen=True)
class Contains:
    """The answer contains the reference; each run of white space counts as one space."""

    name: ClassVar[str] = "contains"
    ignore_case: bool = True
    whole_words: bool = True
    """Whether "123" does not contain "12"."""

    def __call__(self, answer: str, reference: Any, prompt: str | None = None) -> float:
        text = " ".join(normalised(answer, self.ignore_case).split())
        return float(any(self._is_in(text, x) for x in references(reference)))

    def _is_in(self, text: str, reference: Any) -> bool:
        target = " ".join(normalised(reference, self.ignore_case).split())
        if not target:
            raise InvalidInput("contains: the reference is empty, and every answer contains that")
        if not self.whole_words:
            return target in text
        return re.search(rf"(?<!\w){re.escape(target)}(?!\w)", text) is not None


@dataclass(frozen=True)
class Regex:
    """The answer matches: the reference is a pattern, searched for in the answer.

    Or `pattern` is the pattern, and the first group of its last match (all of the match, if it has
    no group) must equal the reference, except for white space at either end; with `match_only`,
    that it matches is enough.
    """

    name: ClassVar[str] = "regex"
    pattern: str | None = None
    ignore_case: bool = False
    match_only: bool = False
    """Whether any match of `pattern` is right: the form of an answer, whatever its reference."""

    @property
    def needs_reference(self) -> bool:
        return not self.match_only

    def __post_init__(self) -> None:
        if self.match_only and self.pattern is None:
            raise InvalidInput("regex: match_only needs a pattern")
        if self.pattern is not None:
            self._compiled(self.pattern)

    def __call__(self, answer: str, reference: Any, prompt: str | None = None) -> float:
        text = as_text(answer)
        if self.pattern is None:
            patterns = (self._compiled(as_text(x)) for x in references(reference))
            return float(any(pattern.search(text) for pattern in patterns))
        matches = list(self._compiled(self.pattern).finditer(text))
        if self.match_only or not matches:
            return float(bool(matches))
        last = matches[-1]
        group = last[1] if last.re.groups else last[0]
        return Exact(self.ignore_case)(group or "", reference)

    def _compiled(self, pattern: str) -> re.Pattern[str]:
        try:
            return re.compile(pattern, re.IGNORECASE if self.ignore_case else 0)
        except re.error as error:
            raise InvalidInput(f"regex: {pattern!r} is no valid pattern ({error})") from error


# --- multiple choice -----------------------------------------------------------------------------

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


# --- numbers -------------------------------------------------------------------------------------

# A number: an adjacent sign, digits in groups of three or plain, an exponent, a fraction. Digits
# next to a letter or another number (H2O, 1.2.3, 3/4/2020) are not a number.
_DIGITS = r"(?:[0-9]{1,3}(?:[,\u00a0\u2009\u202f][0-9]{3})+(?![0-9])|[0-9]+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.[0-9]+)?|(?<!\.)\.[0-9]+)"
_TIMES = r"\s?(?:[x×*]|\\times|\\cdot)\s?10\s?(?:\^|\*\*)\s?\{?(?P<power>[-+]?[0-9]+)\}?"
NUMBER = re.compile(
    r"(?<![^\W_])(?<!\w_)(?<![0-9][./])(?P<sign>(?<![\w)%])[-+−])?(?:\\?[$€£]\s?(?P<sign2>[-−])?)?"
    rf"(?:\\[dt]?frac\{{(?P<top>[0-9]+)\}}\{{(?P<bottom>[0-9]+)\}}"
    rf"|(?P<whole>[0-9]+)\s(?P<over>[0-9]+)/(?P<under>[0-9]+)(?![0-9/])"
    rf"|(?P<decimal>{_DECIMAL})"
    rf"(?:[eE](?P<exponent>[-+]?[0-9]+)(?![0-9])|{_TIMES}|/(?P<divisor>{_DECIMAL})(?![0-9/]))?)"
    r"(?!\.?[0-9])(?!/[0-9]+/[0-9])(?:\s?\\?(?P<percent>%))?"
)
_LONGEST = 400  # digits, and the largest power of ten


@dataclass(frozen=True)
class Number:
    """A number as it is written in a text."""

    value: Fraction
    percent: bool


@dataclass(frozen=True)
class Numeric:
    """The answer's number equals the reference's, within the tolerances.

    Of several numbers in an answer the last (or the first) counts. It reads thousands separators
    (1,234.5), signs, currency signs, fractions (3/4, 1 3/4, \\frac{3}{4}), powers of ten (1.5e3,
    2 x 10^6) and percent. A comma is never a decimal point. "50%" equals "50%"; if only one of the
    two has the percent sign, "50%" equals both 50 and 0.5.
    """

    name: ClassVar[str] = "numeric"
    tolerance: float = 1e-6
    """Differences up to this count as equal."""
    relative: float = 0.0
    """The same as a share of the reference; the larger tolerance counts."""
    take: str = "last"
    """Which of an answer's numbers counts: "first" or "last"."""

    def __post_init__(self) -> None:
        if self.take not in ("first", "last"):
            raise InvalidInput(f'numeric: take={self.take!r}: "first" or "last"')
        if not (0 <= self.tolerance < math.inf and 0 <= self.relative < math.inf):
            raise InvalidInput("numeric: a tolerance must be a finite number, 0 or more")

    def __call__(self, answer: str, reference: Any, prompt: str | None = None) -> float:
        expected = [self._reference(x) for x in references(reference)]
        matches = list(NUMBER.finditer(as_text(answer)))
        read = map(_number, matches if self.take == "first" else reversed(matches))
        number = next((number for number in read if number is not None), None)
        return float(number is not None and any(self._equal(number, x) for x in expected))

    def _reference(self, reference: Any) -> Number:
        read = numbers(as_text(reference))
        if not read:
            raise InvalidInput(f"numeric: the reference {reference!r} holds no number")
        return read[-1]

    def _equal(self, number: Number, expected: Number) -> bool:
        values = {number.value}
        if number.percent and not expected.percent:
            values.add(number.value / 100)
        if expected.percent and not number.percent:
            values.add(number.value * 100)
        allowed = max(Fraction(self.tolerance), Fraction(self.relative) * abs(expected.value))
        return any(abs(value - expected.value) <= allowed for value in values)


def numbers(text: str) -> list[Number]:
    """All numbers of a text, in order, without those that have no value (a division by 0)."""
    read = (_number(match) for match in NUMBER.finditer(text))
    return [number for number in read if number is not None]


def _number(match: re.Match[str]) -> Number | None:
    part = match.groupdict()
    if len(match[0]) > _LONGEST:
        return None
    if part["top"]:
        value = _over(Fraction(part["top"]), part["bottom"])
    elif part["whole"]:
        rest = _over(Fraction(part["over"]), part["under"])
        value = None if rest is None else Fraction(part["whole"]) + rest
    else:
        value = _over(_plain(part["decimal"]), part["divisor"] or "1")
    power = int(part["exponent"] or part["power"] or 0)
    if value is None or abs(power) > _LONGEST:
        return None
    negative = (part["sign"] or "+") in "-−" or part["sign2"] is not None
    value *= Fraction(10) ** power
    return Number(-value if negative else value, part["percent"] is not None)


def _over(top: Fraction, bottom: str) -> Fraction | None:
    divisor = _plain(bottom)
    return top / divisor if divisor else None


def _plain(digits: str) -> Fraction:
    """The value of digits, ignoring thousands separators."""
    return Fraction(re.sub(r"[^0-9.]", "", digits))
