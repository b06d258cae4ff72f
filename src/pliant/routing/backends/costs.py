"""What asking costs: counted in tokens, milliseconds, floating-point operations and money."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from pliant.errors import InvalidInput


@dataclass(frozen=True)
class Price:
    """Money for a million tokens, as the sellers of models state it, in dollars."""

    prompt: float
    answer: float

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not (value >= 0 and math.isfinite(value)):
                raise InvalidInput(f"a price for {name} tokens is {value}; 0 or more is due")

    @classmethod
    def parse(cls, text: str) -> Price:
        """`2.50,10`: dollars for a million tokens of prompt and of answer."""
        try:
            prompt, answer = map(float, text.split(","))
        except ValueError:
            raise InvalidInput(
                f"price {text!r}: two numbers are due, dollars for a million tokens of prompt and "
                "of answer, as in 2.50,10"
            ) from None
        return cls(prompt, answer)


@dataclass(frozen=True)
class Used:
    """What some answers used up, all samples together; None is a quantity nobody knows."""

    calls: int = 0
    """Answers, that is."""
    prompt_tokens: int = 0
    answer_tokens: int = 0
    ms: float = 0.0
    """Of a batch that ran together each answer has its share."""
    flops: float | None = 0.0
    """Estimated as 2 * parameters * tokens; only of models that run here."""
    usd: float | None = 0.0
    """By a price; models without one have none."""

    def __add__(self, other: Used) -> Used:
        return Used(
            *(_sum(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)),
        )

    def of(self, unit: str) -> float:
        """The amount in a unit of `Outcomes`: tokens, usd, ms, flops or calls."""
        amounts: dict[str, float | None] = {
            "tokens": self.prompt_tokens + self.answer_tokens,
            "usd": self.usd,
            "ms": self.ms,
            "flops": self.flops,
            "calls": self.calls,
        }
        found = amounts[unit]
        if found is None:
            raise InvalidInput(f"the cost of an answer in {unit} is not known")
        return float(found)

    def known(self, unit: str) -> bool:
        return (unit, None) not in (("usd", self.usd), ("flops", self.flops))

    def priced(self, price: Price | None) -> Used:
        """With the money that it cost."""
        if price is None:
            return Used(**{**asdict(self), "usd": None})
        usd = (self.prompt_tokens * price.prompt + self.answer_tokens * price.answer) / 1e6
        return Used(**{**asdict(self), "usd": usd})

    def as_dict(self) -> dict[str, Any]:
        """For JSON, without what nobody knows."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> Used:
        return cls(**{"flops": None, "usd": None, **found})


def _sum(a: Any, b: Any) -> Any:
    return None if a is None or b is None else a + b
