"""What can go wrong. Each error says what happened, with which value, and what to do about it."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, TypeVar

T = TypeVar("T")


class PliantError(Exception):
    """The root of all errors that a user can cause or fix: one line and exit code 2 in the CLI."""


class UnsupportedModel(PliantError):
    """The model's structure is unknown: says what was looked for, and how to name it by hand."""


class ModelNotFound(PliantError):
    """A name that is no embedded model, local folder or model on the hub, or a broken model."""


class InvalidInput(PliantError, ValueError):
    """A value that cannot be used: says which one, and what would be accepted."""


class UnknownSetting(InvalidInput, TypeError):
    """A configuration was created with a name that it does not have."""


class AdapterError(PliantError):
    """An adapter cannot be attached, saved or loaded; the model is as it was before."""


class CorruptFile(AdapterError):
    """A saved file is truncated, foreign, of a later version, or lacks what its index promises."""


class WrongBase(AdapterError):
    """An adapter was trained on another base model than the one it is being put on."""


class SlowDtypeWarning(UserWarning):
    """A model was loaded in a dtype that this machine computes slowly."""


def check_whole(name: str, value: object, least: int) -> None:
    """Refuse what is not a whole number of `least` or more."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InvalidInput(f"{name} = {value!r}: give a whole number, {least} or more")


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Refuse what is not one of these."""
    known = tuple(choices)
    if value not in known:
        raise InvalidInput(f"{name} = {value!r}: give one of {', '.join(known)}")


def did_you_mean(name: object, known: Iterable[object]) -> str:
    """The end of an error about an unknown name: the names like it, or else all that are known.

    >>> did_you_mean("promt", ["prompt", "answer"])
    "; did you mean 'prompt'?"
    """
    names = [str(each) for each in known]
    folded = {each.casefold(): each for each in names}
    near = get_close_matches(str(name).casefold(), folded, n=2, cutoff=0.6)
    if near:
        return f"; did you mean {' or '.join(repr(folded[each]) for each in near)}?"
    return f"; there are {', '.join(names)}" if names else "; there are none"


def named_settings(config: type[T]) -> type[T]:
    """A dataclass whose error about a wrong name has the names that are like it."""
    create: Any = config.__init__

    @functools.wraps(create)
    def checked(self: T, *args: Any, **settings: Any) -> None:
        known = [field.name for field in fields(config) if field.init]  # type: ignore[arg-type]
        for name in settings:
            if name not in known:
                # PEFT reads this sentence: it leaves out what a later version may have saved.
                sentence = f"{config.__name__} got an unexpected keyword argument {name!r}"
                raise UnknownSetting(sentence + did_you_mean(name, known))
        create(self, *args, **settings)

    setattr(config, "__init__", checked)  # noqa: B010 -- mypy knows no assignment to a method
    return config


def without_password(text: str) -> str:
    """A library's message without the user name and password of any address in it."""
    return re.sub(r"//[^/@\s]+@", "//***@", text)
