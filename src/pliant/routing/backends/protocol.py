"""The protocol of backends: models that answer, on this machine or behind a URL.

A model is named as everywhere (`nano-s`, a folder, a name on the hub), or by the URL of any server
that speaks OpenAI's protocol: `openai:gpt-4o@https://host/v1`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from pliant.errors import InvalidInput, PliantError
from pliant.loading import embedded
from pliant.routing.prompts import Prompt, messages

# The kinds of failures, by which they are counted.
PROMPT_FAULTS = ("prompt refused", "prompt too long")
MODEL_FAULTS = (
    "timeout",
    "busy",
    "server error",
    "unreachable",
    "refused",
    "broken reply",
    "out of memory",
)


class BackendError(PliantError):
    """A model gave no answer: says which model, why, and after how many tries."""

    def __init__(self, message: str, kind: str, *, fatal: bool = False) -> None:
        assert kind in PROMPT_FAULTS + MODEL_FAULTS, kind
        super().__init__(message)
        self.kind = kind
        self.fatal = fatal
        """Whether every other prompt would fail as well: a wrong key, no such model."""

    @property
    def prompts_fault(self) -> bool:
        """Whether this model cannot answer this prompt, but may answer others."""
        return self.kind in PROMPT_FAULTS


LEAST_TEMPERATURE = 1e-6
"""Divided by less, logits are no longer finite."""


@dataclass(frozen=True)
class Settings:
    """How a model generates its answers."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    """0 always picks the most likely token."""
    samples: int = 1
    """How many answers to the same prompt."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.samples < 1:
            raise InvalidInput(
                f"max_new_tokens={self.max_new_tokens}, samples={self.samples}: give 1 or more"
            )
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise InvalidInput(f"temperature={self.temperature}: give a number, 0 or more")
        if 0 < self.temperature < LEAST_TEMPERATURE:
            raise InvalidInput(
                f"temperature={self.temperature}: give 0, or {LEAST_TEMPERATURE} or more"
            )
        if not 0 <= self.seed < 2**32:
            raise InvalidInput(f"seed={self.seed}: give an integer from 0 to 2**32 - 1")
        if self.samples > 1 and self.temperature == 0:
            raise InvalidInput(
                f"{self.samples} samples at temperature 0 are {self.samples} times the same "
                "answer: give a temperature"
            )


class BackendWarning(UserWarning):
    """A model will answer, but worse or slower than it could."""


@dataclass(frozen=True)
class PromptFormat:
    """How a prompt is put to a model, and where its answer ends."""

    template: str | None = None
    """For a model without a chat template: a text with {prompt} in it."""
    system: str | None = None
    """A system message before prompts that have none; before the text, without a chat template."""
    stop: tuple[str, ...] = ()
    """An answer ends before the first of these texts."""

    def __post_init__(self) -> None:
        if self.template is not None and "{prompt}" not in self.template:
            raise InvalidInput(f"template {self.template!r}: it needs {{prompt}} for the prompt")
        if not all(self.stop):
            raise InvalidInput("stop: an empty text would end every answer at once")

    def messages(self, prompt: Prompt) -> list[dict[str, str]]:
        conversation = messages(prompt)
        if self.system is None or conversation[0]["role"] == "system":
            return conversation
        return [{"role": "system", "content": self.system}, *conversation]

    def text(self, prompt: Prompt, clean: Callable[[str], str] = str) -> str:
        """For a model without a chat template: the contents, cleaned, one a line."""
        text = clean("\n".join(message["content"] for message in messages(prompt)))
        framed = text if self.template is None else self.template.replace("{prompt}", text)
        return framed if self.system is None else f"{self.system}\n{framed}"

    def end_of(self, answer: str) -> int | None:
        """Where the answer ends; None if it holds none of the stops."""
        return min((at for stop in self.stop if (at := answer.find(stop)) >= 0), default=None)

    def as_dict(self) -> dict[str, Any]:
        """For JSON, without what is not set."""
        return {k: list(v) if k == "stop" else v for k, v in vars(self).items() if v}


@dataclass(frozen=True)
class Price:
    """Dollars for a million tokens, as sellers of models state it."""

    prompt: float
    answer: float

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not (value >= 0 and math.isfinite(value)):
                raise InvalidInput(f"the price for {name} tokens is {value}, and must be 0 or more")

    @classmethod
    def parse(cls, text: str) -> Price:
        """`2.50,10`: dollars for a million tokens of prompt and of answer."""
        try:
            prompt, answer = map(float, text.split(","))
        except ValueError:
            raise InvalidInput(
                f"price {text!r}: give two numbers, dollars for a million tokens of prompt and of "
                "answer, as in 2.50,10"
            ) from None
        return cls(prompt, answer)


@dataclass(frozen=True)
class Used:
    """What answers cost, all samples together; None is an unknown quantity."""

    calls: int = 0
    """The number of answers."""
    prompt_tokens: int = 0
    answer_tokens: int = 0
    ms: float = 0.0
    """Answers of one batch share its time equally."""
    flops: float | None = 0.0
    """Estimated as 2 * parameters * tokens; only for models that run here."""
    usd: float | None = 0.0
    """From the price; None for a model without one."""

    def __add__(self, other: Used) -> Used:
        pairs = {name: (amount, vars(other)[name]) for name, amount in vars(self).items()}
        sums: dict[str, Any] = {k: None if None in pair else sum(pair) for k, pair in pairs.items()}
        return Used(**sums)

    def of(self, unit: str) -> float:
        """The amount in a unit of `Outcomes`: tokens, usd, ms, flops or calls."""
        amounts: dict[str, float | None] = {
            "tokens": self.prompt_tokens + self.answer_tokens,
            "usd": self.usd,
            "ms": self.ms,
            "flops": self.flops,
            "calls": self.calls,
        }
        amount = amounts[unit]
        if amount is None:
            raise InvalidInput(f"the cost of an answer in {unit} is unknown")
        return float(amount)

    def known(self, unit: str) -> bool:
        return (unit, None) not in (("usd", self.usd), ("flops", self.flops))

    def priced(self, price: Price | None) -> Used:
        """With `usd` by this price."""
        if price is None:
            return replace(self, usd=None)
        usd = (self.prompt_tokens * price.prompt + self.answer_tokens * price.answer) / 1e6
        return replace(self, usd=usd)

    def as_dict(self) -> dict[str, Any]:
        """For JSON, without unknown quantities."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_dict(cls, content: Any) -> Used:
        """From a file, which somebody may have edited."""
        if not isinstance(content, Mapping):
            raise InvalidInput(f"what an answer used is {content!r}: give numbers by name")
        fields = {"flops": None, "usd": None, **content}
        for name, amount in fields.items():
            unknown = amount is None and name in ("flops", "usd")
            if not (unknown or _is_amount(amount)) or name not in cls.__dataclass_fields__:
                raise InvalidInput(f"what an answer used: {name} = {amount!r} is no amount")
        return cls(**fields)


def _is_amount(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and 0 <= value < float("inf")


@dataclass(frozen=True)
class Answers:
    """A model's answers to one prompt, one a sample, and what they used."""

    texts: tuple[str, ...]
    used: Used
    truncated: int = 0
    """How many of them max_new_tokens truncated."""


Result = tuple[int, Answers | BackendError]
"""A prompt's index, and its answers or the error."""


class Backend(Protocol):
    """A model that answers prompts."""

    name: str

    def ask(self, prompts: Sequence[Prompt], settings: Settings) -> Iterator[Result]:
        """Each prompt's index with its answers or the error, in the order in which they finish."""
        ...

    def count(self, prompt: Prompt) -> int:
        """A prompt's tokens with its chat template; behind a URL an estimate, rather too high."""
        ...

    def context(self) -> int | None:
        """How many tokens prompt and answer may have together, if known."""
        ...

    def knows(self, unit: str) -> bool:
        """Whether an answer's cost in this unit is known, without a price."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class ModelSpec:
    """A model by the name that the user gives it."""

    name: str
    """Its name in labels, routers and ledgers."""
    model: str
    url: str | None = None

    @classmethod
    def parse(cls, text: str) -> ModelSpec:
        """Parse `nano-s`, `./folder`, `owner/model` or `openai:MODEL@URL`, or `NAME=` and one."""
        named = re.fullmatch(r"([\w.:/-]+)=(.+)", text)
        if named and not Path(text).is_dir():
            inner = cls.parse(named[2])
            return cls(named[1], inner.model, inner.url)
        if text.startswith("openai:"):
            parts = re.fullmatch(r"openai:(.+?)@(\w+://.+)", text)
            if not parts:
                raise InvalidInput("a model behind a URL is written openai:MODEL@https://host/v1")
            return cls(parts[1], parts[1], _checked_url(parts[2]))
        folder = Path(text).expanduser()
        if folder.is_dir() and text not in embedded():
            return cls(folder.resolve().name, str(folder.resolve()))
        return cls(text, text)

    def __str__(self) -> str:
        inner = self.model if self.url is None else f"openai:{self.model}@{self.url}"
        return inner if ModelSpec.parse(inner).name == self.name else f"{self.name}={inner}"


def check_names(specs: Sequence[ModelSpec]) -> None:
    names = [spec.name for spec in specs]
    for name in names:
        if names.count(name) > 1:
            raise InvalidInput(
                f"two models are called {name!r}: give one of them a name, as in other={name}"
            )


def _checked_url(url: str) -> str:
    """Only a plain http(s) address: a password in it would be written into files."""
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 (read, it is checked)
    except ValueError as error:
        raise InvalidInput(f"an address after openai:MODEL@ is none: {error}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InvalidInput(
            f"{parts.scheme}://{parts.hostname or ''} is no server address such as https://host/v1"
        )
    if parts.username or parts.password or parts.query or parts.fragment:
        raise InvalidInput(
            f"the address of {parts.hostname} has more than a path: put a key into an environment "
            "variable, because the address is written into files"
        )
    return url.rstrip("/")
