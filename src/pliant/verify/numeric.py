"""The verifier for numbers, and how they are found in a text."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

from pliant.errors import InvalidInput
from pliant.verify.reference import as_text, each

# A number: a sign that touches it, groups of three or plain digits, an exponent, a fraction. Digits
# that a letter or another number runs into (H2O, 1.2.3, 3/4/2020) are none.
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
    """A number as a text has it."""

    value: Fraction
    percent: bool


@dataclass(frozen=True)
class Numeric:
    """The answer's number is the reference's, within the tolerances.

    An answer may say more: its last number counts (or its first). Understood are thousands
    separators (1,234.5), signs, currency signs, fractions (3/4, 1 3/4, \\frac{3}{4}), powers of ten
    (1.5e3, 2 x 10^6) and percent. A comma is never a decimal point. "50%" equals "50%"; where just
    one of the two has the sign, both 50 and 0.5 are taken for it.
    """

    name: ClassVar[str] = "numeric"
    tolerance: float = 1e-6
    """The largest difference that is none."""
    relative: float = 0.0
    """The same, as a share of the reference; the larger of the two counts."""
    take: str = "last"

    def __post_init__(self) -> None:
        if self.take not in ("first", "last"):
            raise InvalidInput(f'numeric: take={self.take!r}: "first" or "last"')
        if not (0 <= self.tolerance < math.inf and 0 <= self.relative < math.inf):
            raise InvalidInput("numeric: a tolerance is a number, 0 or more")

    def __call__(self, answer: str, reference: Any, prompt: str | None = None) -> float:
        wanted = [self._reference(x) for x in each(reference)]
        matches = list(NUMBER.finditer(as_text(answer)))
        read = map(_number, matches if self.take == "first" else reversed(matches))
        said = next((number for number in read if number is not None), None)
        return float(said is not None and any(self._equal(said, number) for number in wanted))

    def _reference(self, reference: Any) -> Number:
        found = numbers(as_text(reference))
        if not found:
            raise InvalidInput(f"numeric: the reference {reference!r} holds no number")
        return found[-1]

    def _equal(self, said: Number, wanted: Number) -> bool:
        values = {said.value}
        if said.percent and not wanted.percent:
            values.add(said.value / 100)
        if wanted.percent and not said.percent:
            values.add(said.value * 100)
        allowed = max(Fraction(self.tolerance), Fraction(self.relative) * abs(wanted.value))
        return any(abs(value - wanted.value) <= allowed for value in values)


def numbers(text: str) -> list[Number]:
    """All numbers of a text, in order; what cannot be one (a division by 0) is left out."""
    found = (_number(match) for match in NUMBER.finditer(text))
    return [number for number in found if number is not None]


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
    """The value of digits, separators of thousands aside."""
    return Fraction(re.sub(r"[^0-9.]", "", digits))
