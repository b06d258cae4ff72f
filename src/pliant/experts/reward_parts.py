"""One part of a reward: a verifier or a function with its weight, and how it is written in a line.

numeric                             a verifier of pliant.verify
regex:pattern=#### (.+)             with options, KEY=VALUE, separated by commas
contains=0.5                        with a weight; regex=0.5:pattern=... has both
rewards.py:brevity=0.1              a function of a file, or of a package.module
judge:model=openai:NAME@https://host/v1
reward_model:model=FOLDER,raw=true
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pliant import options
from pliant.errors import InvalidInput, did_you_mean
from pliant.verify import VERIFIERS, Function, Judge, Verifier, verifier
from pliant.verify.custom import import_function

OpenJudge = Callable[[str], Callable[[str], str]]
"""Makes of a model's name what asks it, as `pliant.routing.judge.open_judge` does."""

_FUNCTION = re.compile(r"(?P<place>.+\.py|[\w.]+):(?P<name>[A-Za-z_]\w*)(?:=(?P<weight>.*))?", re.S)
_VERIFIER = re.compile(r"(?P<name>[\w.-]*)(?:=(?P<weight>[^:]*))?(?::(?P<options>.*))?", re.S)
# A comma ends an option only where another begins: a{1,2} is one pattern.
_NEXT_OPTION = re.compile(r",(?=[A-Za-z_]+=)")


@dataclass(frozen=True)
class RewardPart:
    """What one verifier or function gives an answer, times a weight."""

    measure: Verifier | Callable[..., Any]
    """A verifier; a function of the answer, the reference and the prompt, as many as it takes; or a
    function in trl's form, which takes `completions` and returns a list."""
    weight: float = 1.0
    label: str = ""
    """Its name in reports; by default the name of the verifier or function."""
    _value: Callable[..., Any] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.weight, bool) or not isinstance(self.weight, (int, float)):
            raise InvalidInput(f"the weight {self.weight!r} is not a number")
        if not math.isfinite(self.weight):
            raise InvalidInput(f"the weight {self.weight} is not finite")
        if not callable(self.measure):
            raise InvalidInput(f"{self.measure!r} is no verifier and no function")
        measure: Any = self.measure
        if not self.is_verifier:
            measure = self.measure if self.in_batches else Function(self.measure)
        value = measure.value if isinstance(measure, Function) else measure
        object.__setattr__(self, "_value", value)
        if not self.label:
            function = measure.function if isinstance(measure, Function) else measure
            named = function if isinstance(function, str) else getattr(function, "__name__", None)
            label = named or getattr(measure, "name", None) or type(measure).__name__
            object.__setattr__(self, "label", label)

    @property
    def is_verifier(self) -> bool:
        return type(self.measure) in VERIFIERS.values()

    @property
    def in_batches(self) -> bool:
        """Whether it is a function in trl's form."""
        return not self.is_verifier and "completions" in _parameters(self.measure)

    @property
    def needs_reference(self) -> bool:
        needs: bool = getattr(self.measure, "needs_reference", self.is_verifier)
        return needs

    @property
    def row_columns(self) -> tuple[str, ...]:
        """A row with all of these is the reference; without any, only the answer's column is."""
        columns: tuple[str, ...] = getattr(self.measure, "row_columns", ())
        return columns

    @property
    def concurrent(self) -> bool:
        """Whether several answers may be measured at a time."""
        return bool(getattr(self.measure, "concurrent", False))

    @property
    def own_seconds(self) -> float:
        """What its measure allows an answer by itself."""
        return float(getattr(self.measure, "seconds", 0.0))

    def load(self) -> None:
        """Load the model behind it, if there is one: an error here is one of the settings."""
        load = getattr(self.measure, "load", None) if self.is_verifier else None
        if load is not None:
            load()

    def value(self, answer: str, reference: Any, prompt: str | None) -> Any:
        """What its measure returns or raises."""
        return self._value(answer, reference, prompt)

    def values(self, prompts: Any, completions: Any, columns: Mapping[str, Any]) -> Any:
        """What a function in trl's form returns or raises."""
        parameters = _parameters(self.measure)
        values = {"prompts": prompts, "completions": completions, **columns}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            values = {name: value for name, value in values.items() if name in parameters}
        return self._value(**values)


def _parameters(function: Any) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):  # some builtins have no signature
        return {}


def parse_part(text: str, open_judge: OpenJudge | None = None) -> RewardPart:
    """The part that a line such as `contains=0.5` names; see the top of this file."""
    if not isinstance(text, str):
        raise InvalidInput(f"{text!r} is no text that names a reward")
    text = text.strip()
    match = _VERIFIER.fullmatch(text)
    if match is None or (match["name"] not in VERIFIERS and _FUNCTION.fullmatch(text)):
        return _function(text)
    name = match["name"]
    if name not in _names():
        raise InvalidInput(f"no reward {text!r}{did_you_mean(name, _names())}")
    weight = _weight(match["weight"], text)
    label = name if match["options"] is None else f"{name}:{match['options']}"
    return RewardPart(_verifier(name, match["options"], text, open_judge), weight, label)


def _function(text: str) -> RewardPart:
    match = _FUNCTION.fullmatch(text)
    if match is None:
        raise InvalidInput(
            f"no reward {text!r}: write NAME, NAME=WEIGHT, NAME:KEY=VALUE,... or file.py:function"
        )
    label = f"{match['place']}:{match['name']}"
    try:
        function = import_function(label)
    except InvalidInput as error:
        near = "" if "." in match["place"] else did_you_mean(match["place"], _names())
        raise InvalidInput(f"reward {text!r}: {error}{near}") from error
    try:
        return RewardPart(function, _weight(match["weight"], text), label)
    except InvalidInput as error:
        raise InvalidInput(f"reward {text!r}: {error}") from error


def _names() -> list[str]:
    return [name for name in VERIFIERS if name != Function.name]


def _weight(written: str | None, text: str) -> float:
    if written is None:
        return 1.0
    try:
        weight = float(written)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise InvalidInput(f"reward {text!r}: the weight {written!r} is not a finite number")
    return weight


def _verifier(name: str, written: str | None, text: str, open_judge: OpenJudge | None) -> Verifier:
    values: dict[str, Any] = {}
    kind = VERIFIERS[name]
    known = {option.name: option for option in options.read(kind) if option.name != "ask"}
    asked = None
    flag = f"reward {text!r}:"
    for key, value in options.named_values(_options(written), flag, "KEY=VALUE").items():
        if kind is Judge and key == "model":
            asked = value
        elif key in known:
            try:
                values[key] = known[key].from_text(value)
            except InvalidInput as error:
                raise InvalidInput(f"{flag} {error}") from None
        else:
            names = [*known, "model"] if kind is Judge else list(known)
            raise InvalidInput(f"{flag} no option {key!r}{did_you_mean(key, names)}")
    try:
        if kind is Judge:
            values["ask"] = _asking(asked, open_judge)
        return verifier(name, **values)
    except InvalidInput as error:
        raise InvalidInput(f"{flag} {error}") from None


def _options(written: str | None) -> list[str]:
    return [] if written is None else _NEXT_OPTION.split(written)


def _asking(model: str | None, open_judge: OpenJudge | None) -> Callable[[str], str]:
    if not model:
        raise InvalidInput("a judge is a model: judge:model=openai:NAME@https://host/v1")
    if open_judge is None:
        raise InvalidInput("give open_judge=pliant.routing.judge.open_judge, which opens models")
    return open_judge(model)
