"""A dataclass is a set of options: one a field, with its type, its default and its help.

    @dataclass(frozen=True, kw_only=True)
    class PaintOptions:
        model: Annotated[str, Flag(positional=True)]
        '''What to paint.'''
        layers: Annotated[int, Ge(1)] = 3
        '''Layers of paint.'''

The docstring under a field is the help of its option. `pliant.cli` makes command lines of such
classes and `pliant.recipes` reads them from YAML files, so that neither needs a schema of its own.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import math
import textwrap
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass
from functools import cache, reduce
from operator import or_
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from annotated_types import BaseMetadata, Ge, Le

from pliant.errors import InvalidInput, did_you_mean

Options = TypeVar("Options")
Command = Callable[..., None]
"""A function whose every parameter is an instance of an options class."""
MOST = 2**32 - 1
"""Beyond this, no whole number is a count, a seed or a size that a command can use."""


@dataclass(frozen=True)
class Flag:
    """How an option appears on the command line, where its field does not tell."""

    positional: bool = False
    """Given by its place, without a name."""
    aliases: tuple[str, ...] = ()
    """Further names, as in `-o`."""
    metavar: str | None = None
    """What stands for the value in the help."""
    hidden: bool = False
    """Left out of the help."""
    group: str | None = None
    """The heading that it stands under in the help, where its name does not tell."""


@dataclass(frozen=True)
class Option:
    """One field of an options class."""

    name: str
    type: Any
    """The type of its value, without None and without its bounds."""
    default: Any
    """`dataclasses.MISSING` if a value is required."""
    help: str
    flag: Flag
    optional: bool
    """Whether None is a value."""
    bounds: tuple[BaseMetadata, ...]

    @property
    def required(self) -> bool:
        return self.default is MISSING

    @property
    def item_type(self) -> Any:
        """The type of each value of an option that takes several, else None."""
        return get_args(self.type)[0] if get_origin(self.type) is tuple else None

    @property
    def choices(self) -> tuple[Any, ...]:
        return get_args(self.type) if get_origin(self.type) is Literal else ()

    @property
    def least(self) -> Any:
        return next((bound.ge for bound in self.bounds if isinstance(bound, Ge)), None)

    @property
    def most(self) -> Any:
        return next((bound.le for bound in self.bounds if isinstance(bound, Le)), None)

    def check(self, value: Any, shown: str) -> None:
        """Refuse what no command can use: NaN, 10**30, a text that no file can hold; `shown` is
        how the option is written where the value comes from."""
        for each in value if isinstance(value, (tuple, list)) else (value,):
            if problem := unusable(each):
                raise InvalidInput(f"{shown}: {problem}, and is {str(each)[:60]!r}")

    def from_text(self, text: str) -> Any:
        """The value of a text: `4`, `0.5`, `true`; `none` is None where that is a value."""
        if self.optional and text.lower() == "none":
            return None
        value: Any = text
        if self.item_type is not None:
            value = [part.strip() for part in text.split(",") if part.strip()]
        return self._validated(value, strict=False)

    def from_value(self, value: Any) -> Any:
        """The value as Python code gives it, of the right type or convertible to it."""
        return self._validated(value, strict=False)

    def from_yaml(self, value: Any) -> Any:
        """The value as YAML gives it, of exactly the right type: YAML's `no` is not a text."""
        if self.item_type is not None and isinstance(value, list):
            value = tuple(value)
        return self._validated(value, strict=True)

    def _validated(self, value: Any, strict: bool) -> Any:
        from pydantic import TypeAdapter, ValidationError  # not needed for --help

        kind: Any = Annotated[(self.type, *self.bounds)] if self.bounds else self.type
        kind = kind | None if self.optional else kind
        try:
            result = TypeAdapter(kind).validate_python(value, strict=strict)
        except ValidationError as error:
            problem = error.errors()[0]["msg"].removeprefix("Input ")
            raise InvalidInput(f"{self.name} {problem}, and is {value!r}") from None
        self.check(result, self.name)
        return result


@cache
def read(options: Any) -> tuple[Option, ...]:
    """The options of a dataclass."""
    hints, helps = get_type_hints(options, include_extras=True), _docstrings(options)
    return tuple(
        _option(field, hints[field.name], helps.get(field.name, ""))
        for field in dataclasses.fields(options)
        if field.init
    )


def classes(command: Command) -> dict[str, type]:
    """The options class of each parameter of a command."""
    hints = get_type_hints(command)
    return {name: hints[name] for name in inspect.signature(command).parameters}


def of(command: Command) -> tuple[Option, ...]:
    """All options of a command."""
    return tuple(option for kind in classes(command).values() for option in read(kind))


def call(command: Command, values: Mapping[str, Any]) -> None:
    """Call a command with the values of its options; those that are missing keep their defaults."""
    command(**arguments(command, values))


def arguments(command: Command, values: Mapping[str, Any]) -> dict[str, Any]:
    """An instance of the options class of each parameter."""
    return {
        name: kind(**{o.name: values[o.name] for o in read(kind) if o.name in values})
        for name, kind in classes(command).items()
    }


def named_values(texts: Iterable[str], flag: str, form: str = "name=value") -> dict[str, str]:
    """Texts like `name=value` as a dictionary; each name once, with underscores."""
    values: dict[str, str] = {}
    for text in texts:
        name, equals, value = (part.strip() for part in text.partition("="))
        name = name.replace("-", "_")
        if not equals or not name:
            raise InvalidInput(f"{flag} {text!r}: write it as {form}")
        if name in values:
            raise InvalidInput(f"{flag} {name} is given twice")
        values[name] = value
    return values


def from_texts(
    kind: Callable[..., Options], texts: Mapping[str, str], flag: str, **values: Any
) -> Options:
    """A dataclass from `named_values` and from further values, where None means not given."""
    fields = {option.name: option for option in read(kind)}
    values = {name: value for name, value in values.items() if value is not None}
    for name, text in texts.items():
        if name not in fields:
            near = did_you_mean(name, sorted(fields))
            raise InvalidInput(f"{flag} {name}: there is none{near}")
        try:
            values[name] = fields[name].from_text(text)
        except InvalidInput as error:
            raise InvalidInput(f"{flag} {name}={text}: {error}") from None
    return kind(**values)


def unusable(value: Any) -> str | None:
    """What is wrong with a value, whichever option it is for."""
    if isinstance(value, float) and not math.isfinite(value):
        return "must be a finite number"
    if isinstance(value, int) and abs(value) > MOST:
        return f"must be at {f'most {MOST:,}' if value > 0 else f'least -{MOST:,}'}"
    if isinstance(value, (str, Path)):
        text = str(value)
        if "\0" in text:
            return "must not hold a NUL character"
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            return "must be text that UTF-8 can hold"
    return None


def _option(field: dataclasses.Field[Any], hint: Any, help: str) -> Option:
    kind, marks = _without_marks(hint)
    optional = get_origin(kind) in (Union, types.UnionType) and type(None) in get_args(kind)
    if optional:
        kind, inner = _without_marks(_without_none(kind))
        marks = (*marks, *inner)
    default = field.default
    if field.default_factory is not MISSING:
        default = field.default_factory()
    flag = next((mark for mark in marks if isinstance(mark, Flag)), Flag())
    bounds = tuple(mark for mark in marks if isinstance(mark, BaseMetadata))
    return Option(field.name, kind, default, help, flag, optional, bounds)


def _without_marks(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    if get_origin(hint) is Annotated:
        kind, *marks = get_args(hint)
        return kind, tuple(marks)
    return hint, ()


def _without_none(hint: Any) -> Any:
    return reduce(or_, (part for part in get_args(hint) if part is not type(None)))


def _docstrings(options: type) -> dict[str, str]:
    """The docstring under each field, from the source; a subclass inherits them."""
    texts: dict[str, str] = {}
    for kind in reversed(options.__mro__[:-1]):
        try:
            source = inspect.getsource(kind)
        except (OSError, TypeError):  # no source to read: options without help
            continue
        (body,) = ast.parse(textwrap.dedent(source)).body
        assert isinstance(body, ast.ClassDef)
        for field, text in zip(body.body, body.body[1:], strict=False):
            match field, text:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(help))),
                ):
                    texts[name] = " ".join(help.split())
    return texts
