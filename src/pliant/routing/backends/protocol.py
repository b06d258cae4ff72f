"""Whatever can be asked: one protocol for models that run here and for those behind a URL.

    backend = open_backend(ModelSpec.parse("nano-s"))
    for at, answers in backend.ask(["what is 2+2"], Settings(max_new_tokens=24)):
        ...                     # as they are done; what failed is a BackendError in their place

A model is named as everywhere (`nano-s`, a folder, a name on the hub), or by the URL of any server
that speaks OpenAI's protocol: `openai:gpt-4o@https://host/v1`.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from pliant.errors import InvalidInput, PliantError
from pliant.routing.backends.costs import Used
from pliant.routing.prompts import Prompt

# What can go wrong with one prompt, in a word each: these are what failures are counted by.
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
    """A model gave no answer: says which, why, and after how many tries."""

    def __init__(self, message: str, kind: str, *, hopeless: bool = False) -> None:
        assert kind in PROMPT_FAULTS + MODEL_FAULTS, kind
        super().__init__(message)
        self.kind = kind
        self.hopeless = hopeless
        """Whether any other prompt would fare the same: a wrong key, no such model."""

    @property
    def prompts_fault(self) -> bool:
        """Whether it is the prompt that this model cannot take; another prompt may do."""
        return self.kind in PROMPT_FAULTS


@dataclass(frozen=True)
class Settings:
    """How to answer."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    """0 always takes the likeliest token."""
    samples: int = 1
    """How many answers to the same prompt."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.samples < 1:
            raise InvalidInput(
                f"max_new_tokens={self.max_new_tokens}, samples={self.samples}: 1 or more are due"
            )
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise InvalidInput(f"temperature={self.temperature}: a number, 0 or more, is due")
        if not 0 <= self.seed < 2**32:
            raise InvalidInput(f"seed={self.seed}: a whole number from 0 to below 2**32 is due")
        if self.samples > 1 and self.temperature == 0:
            raise InvalidInput(
                f"{self.samples} samples at temperature 0 are {self.samples} times the same "
                "answer: give a temperature"
            )


@dataclass(frozen=True)
class Answers:
    """A model's answers to one prompt, one a sample, and what they used."""

    texts: tuple[str, ...]
    used: Used
    cut: int = 0
    """How many of them max_new_tokens cut off."""


Asked = tuple[int, Answers | BackendError]


class Backend(Protocol):
    """A model that can be asked."""

    name: str

    def ask(self, prompts: Sequence[Prompt], settings: Settings) -> Iterator[Asked]:
        """Each prompt's number with its answers or with what went wrong, as they are done."""
        ...

    def count(self, prompt: Prompt) -> int:
        """How many tokens a prompt is with its frame; behind a URL an estimate, rather too high."""
        ...

    def context(self) -> int | None:
        """How many tokens prompt and answer may have together, where that is known."""
        ...

    def knows(self, unit: str) -> bool:
        """Whether an answer's cost is known in a unit, before any price."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class ModelSpec:
    """A model as the user names it."""

    name: str
    """What labels, routers and ledgers call it."""
    model: str
    url: str | None = None

    @classmethod
    def parse(cls, text: str) -> ModelSpec:
        """`nano-s`, `./folder`, `owner/model`, `openai:MODEL@URL`; before any of them `name=`."""
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
        if folder.is_dir() and text not in _embedded():
            return cls(folder.resolve().name, str(folder.resolve()))
        return cls(text, text)

    def __str__(self) -> str:
        inner = self.model if self.url is None else f"openai:{self.model}@{self.url}"
        return inner if ModelSpec.parse(inner).name == self.name else f"{self.name}={inner}"


def open_backend(spec: ModelSpec, **options: Any) -> Backend:
    """The backend of a spec; nothing is loaded or called before it is asked.

    Options for a model that runs here: device, dtype, tokens_a_batch, trust_remote_code; for one
    behind a URL: key_env, concurrency, timeout, tries, context_tokens.
    """
    if spec.url is None:
        from pliant.routing.backends.local import LocalBackend

        return LocalBackend(spec.name, spec.model, **options)
    from pliant.routing.backends.remote import OpenAIBackend

    return OpenAIBackend(spec.name, spec.model, spec.url, **options)


def different_names(specs: Sequence[ModelSpec]) -> None:
    names = [spec.name for spec in specs]
    for name in names:
        if names.count(name) > 1:
            raise InvalidInput(
                f"two models are called {name!r}: name one of them yourself, as in other={name}"
            )


def _embedded() -> list[str]:
    from pliant.loading import embedded

    return embedded()


def _checked_url(url: str) -> str:
    """An http(s) address and nothing else: a password in it would be written into files."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InvalidInput(
            f"{parts.scheme}://{parts.hostname or ''} is no address of a server: https://host/v1 is"
        )
    if parts.username or parts.password or parts.query or parts.fragment:
        raise InvalidInput(
            f"the address of {parts.hostname} has more than a path: a key belongs into an "
            "environment variable, for an address is written into files"
        )
    return url.rstrip("/")


def key_from(environment_variable: str) -> str | None:
    """The key, which is read where it is used and kept nowhere."""
    return os.environ.get(environment_variable) or None
