"""The verifier for numbers, and how it reads them from a text."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

from pliant.errors import InvalidInput
from pliant.verify.text import as_text, references

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
