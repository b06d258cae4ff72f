"""A user's goal for a router, in words: a budget, a quality, or a risk with a confidence."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from pliant.errors import InvalidInput

EXAMPLES = (
    "30 % of calls",
    "at most $0.50 per 1,000 prompts",
    "95 % of the large model's quality",
    "at most 2 % worse, with 95 % confidence",
)

_NUMBER = r"(?P<amount>[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)"
_SHARE = rf"{_NUMBER}\s*(?P<percent>%|per\s?cent)?"
_LARGE = r"(?:large|larger|largest|strong|stronger|strongest|big|bigger|biggest|dearer|better|best)"
_STRONG = rf"(?:the\s+)?{_LARGE}(?:\s+(?:model|one))?"
_MOST = r"(?:(?:at\s+most|no\s+more\s+than|not\s+more\s+than|up\s+to|within|<=?)\s+)?"
_LEAST = r"(?:(?:at\s+least|no\s+less\s+than|>=?)\s+)?"
_QUALITY = r"(?:quality|accuracy)"
_CALLS = r"(?:calls|prompts|requests|questions|queries|traffic)"
_CONFIDENCE = (
    r"(?:,?\s*(?:with|at)\s+(?:a\s+)?(?P<confidence>[0-9]+(?:\.[0-9]+)?|\.[0-9]+)\s*"
    r"(?P<confidence_percent>%|per\s?cent)?\s*(?:confidence|certainty|probability))?"
)
_UNIT = r"(?P<unit>\$|usd|dollars?|tokens?|ms|milliseconds?|flops|calls?)"
_EACH = r"\s*(?:per|an?|each|for|/)\s*(?P<every>[0-9][0-9,]*|thousand|million)?\s*"
_PROMPTS = r"(?:prompts?|calls?|requests?|questions?|queries|query)?"
_UNITS = {"$": "usd", "dollar": "usd", "millisecond": "ms", "token": "tokens", "call": "calls"}

_PATTERNS: dict[str, tuple[str, ...]] = {
    "share": (rf"{_MOST}{_SHARE}\s+of\s+(?:all\s+)?(?:the\s+)?{_CALLS}(?:\s+to\s+{_STRONG})?",),
    "quality": (
        rf"{_LEAST}{_SHARE}\s+of\s+{_STRONG}(?:['’]s)?\s+{_QUALITY}{_CONFIDENCE}",
        rf"{_LEAST}{_SHARE}\s+of\s+the\s+{_QUALITY}\s+of\s+{_STRONG}{_CONFIDENCE}",
    ),
    "risk": (rf"{_MOST}{_SHARE}(?:\s+points?)?\s+worse(?:\s+than\s+{_STRONG})?{_CONFIDENCE}",),
    "cost": (
        rf"{_MOST}(?P<unit>\$)\s*{_NUMBER}{_EACH}{_PROMPTS}",
        rf"{_MOST}{_NUMBER}\s*{_UNIT}{_EACH}{_PROMPTS}",
    ),
}
_COMPILED = [(kind, re.compile(p, re.IGNORECASE)) for kind, ps in _PATTERNS.items() for p in ps]


@dataclass(frozen=True)
class Goal:
    """A point on the curve of quality against cost; `parse` reads it and `str` writes it.

    - share: at most `amount` of the calls go to the strong model.
    - cost: a prompt costs at most `amount` of the `unit`, on average.
    - quality: at least `amount` times the strong model's quality.
    - risk: a quality at most `amount` under the strong model's, in points (.02 is 2 %).

    With a `confidence` the last two are proved; a risk always has one, .95 by default.
    """

    kind: Literal["share", "cost", "quality", "risk"]
    amount: float
    confidence: float | None = None
    unit: str | None = None

    def __post_init__(self) -> None:
        if self.kind == "risk" and self.confidence is None:
            object.__setattr__(self, "confidence", 0.95)
        if not 0 <= self.amount < float("inf"):
            raise InvalidInput(f"{self.kind}: {self.amount} must be finite, 0 or more")
        if self.kind != "cost" and self.amount > 1:
            raise InvalidInput(f"{self.kind}: {self.amount} is more than all of it (1, or 100 %)")
        if self.kind == "cost" and self.unit is None:
            raise InvalidInput("cost: a unit is needed, such as usd or tokens")
        if self.confidence is not None and not 0 < self.confidence < 1:
            raise InvalidInput(f"confidence: {self.confidence} is not between 0 and 1 (100 %)")
        if self.confidence is not None and self.kind in ("share", "cost"):
            raise InvalidInput(f"{self.kind}: a budget cannot have a confidence")

    @classmethod
    def parse(cls, text: str) -> Goal:
        """Read a goal. A number with a percent sign is out of 100, one without is out of 1."""
        sentence = " ".join(text.strip().rstrip(".").split())
        for kind, pattern in _COMPILED:
            match = pattern.fullmatch(sentence)
            if match:
                return _read(kind, match, text)
        raise InvalidInput(
            f"{text!r} is no goal that is understood; write one of: "
            + "; ".join(f'"{example}"' for example in EXAMPLES)
        )

    @classmethod
    def of_sentence(cls, sentence: str) -> Goal | None:
        """The goal that a threshold's sentence begins with; None for one that was set by hand."""
        try:
            return cls.parse(sentence.split(":")[0])
        except InvalidInput:
            return None

    def share_of_quality(self, strongest: float) -> float | None:
        """The share of the strongest model's quality that this asks for, if it asks for one."""
        if self.kind == "quality":
            return self.amount
        return 1 - self.amount / strongest if self.kind == "risk" and strongest > 0 else None

    def check_unit(self, unit: str) -> None:
        """Refuse a budget in another unit than that of the labels' costs."""
        if self.kind == "cost" and self.unit != unit:
            raise InvalidInput(f"{self}: the costs of these labels are in {unit}, not {self.unit}")

    def __str__(self) -> str:
        confidence = f", with {_percent(self.confidence)} confidence" if self.confidence else ""
        if self.kind == "share":
            return f"{_percent(self.amount)} of calls"
        if self.kind == "cost":
            money = f"${_plain(self.amount)}" if self.unit == "usd" else None
            return f"at most {money or f'{_plain(self.amount)} {self.unit}'} per prompt"
        if self.kind == "quality":
            return f"{_percent(self.amount)} of the large model's quality{confidence}"
        return f"at most {_percent(self.amount)} worse{confidence}"


def _read(kind: str, match: re.Match[str], text: str) -> Goal:
    part = match.groupdict()
    amount = float(part["amount"].replace(",", ""))
    if kind == "cost":
        unit = part["unit"].lower()
        unit = _UNITS.get(unit.rstrip("s"), unit) if unit != "ms" else unit
        return Goal("cost", amount / _every(part["every"]), None, unit)
    amount = _share(amount, part["percent"], text)
    level = part.get("confidence")
    confidence = _share(float(level), part["confidence_percent"], text) if level else None
    return Goal(kind, amount, confidence)  # type: ignore[arg-type]


def _share(number: float, percent: str | None, text: str) -> float:
    if percent:
        return round(number / 100, 12)
    if number > 1:
        raise InvalidInput(f"{text!r}: {number:g} of what? Write {number:g} %, or a share up to 1")
    return number


def _every(text: str | None) -> float:
    """The number of prompts that an amount of money is for."""
    named = {"thousand": 1e3, "million": 1e6}
    number = named.get((text or "1").lower()) or float((text or "1").replace(",", ""))
    if number <= 0:
        raise InvalidInput("a cost for 0 prompts is no cost")
    return number


def _percent(share: float) -> str:
    return f"{_plain(round(100 * share, 10))} %"


def _plain(number: float) -> str:
    """Without an exponent, and without zeros at the end."""
    text = f"{number:.12f}".rstrip("0").rstrip(".")
    return text or "0"
