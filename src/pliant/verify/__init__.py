"""Is this answer right? One set of verifiers, for grading, labels and rewards.

    right = verifier("numeric", tolerance=0.01)
    right("So the answer is 1,234.", "1234")     # 1.0
    VERIFIERS                                    # the names: exact, numeric, contains, ...

A verifier takes an answer, its reference and, optionally, the prompt, and returns how right the
answer is, in [0, 1]. A list of references means any of them; a list of unit tests, all of them. A
reference that cannot be used is an error; an answer that cannot be used is a 0.
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

from pliant.errors import InvalidInput, did_you_mean
from pliant.options import read
from pliant.verify.custom import Function, Judge, NoVerdict
from pliant.verify.reward_model import RewardModel
from pliant.verify.text import Choice, Contains, Exact, Numeric, Regex
from pliant.verify.unit_tests import UnitTests

__all__ = [
    "TEXT_VERIFIERS",
    "VERIFIERS",
    "Choice",
    "Contains",
    "Exact",
    "Function",
    "Judge",
    "NoVerdict",
    "Numeric",
    "Regex",
    "RewardModel",
    "UnitTests",
    "Verifier",
    "verifier",
]


def verifier(name: str, **options: Any) -> Verifier:
    """The verifier of that name, with its options (the fields of its class)."""
    if name not in VERIFIERS:
        raise InvalidInput(f"no verifier {name!r}{did_you_mean(name, list(VERIFIERS))}")
    kind = VERIFIERS[name]
    known = {option.name: option for option in read(kind)}
    for given, value in options.items():
        if given not in known:
            raise InvalidInput(f"{name} has no option {given!r}{did_you_mean(given, known)}")
        if isinstance(value, (bool, int, float, str)):  # and no function
            options[given] = known[given].from_value(value)
    for option in known.values():
        if option.required and option.name not in options:
            raise InvalidInput(f"{name} needs its option {option.name!r}")
    try:
        chosen: Verifier = kind(**options)
    except TypeError as error:
        raise InvalidInput(f"{name}: {error}") from error
    return chosen


class Verifier(Protocol):
    """How right an answer is, in [0, 1]."""

    name: ClassVar[str]

    def __call__(self, answer: str, reference: Any, prompt: str | None = None) -> float: ...


TEXT_VERIFIERS: tuple[type, ...] = (Exact, Numeric, Contains, Regex, Choice)
"""Those that compare texts alone: they run nothing and ask nobody."""

VERIFIERS: dict[str, type] = {
    kind.name: kind
    for kind in (Exact, Numeric, Contains, Regex, Choice, UnitTests, Function, Judge, RewardModel)
}
