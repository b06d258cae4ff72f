"""A recipe: one command and its options, kept in a strict YAML file.

    command: doctor
    model: nano-l
    json: true

The keys are the command's own parameters, with underscores for dashes, so there is no second schema
to keep in step. A key that the command does not have, a value of the wrong type and a key given
twice are errors. A path that is not absolute is relative to the recipe, wherever one runs it from.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import yaml
from pydantic import Field, TypeAdapter, ValidationError

from pliant.errors import InvalidInput


@dataclass(frozen=True)
class Recipe:
    """What a recipe file says, before it is held against the command's parameters."""

    path: Path
    command: str
    options: Mapping[str, Any]
    lines: Mapping[str, int]

    def where(self, key: str) -> str:
        line = self.lines.get(key)
        return f"{self.path}, line {line}" if line else str(self.path)


def read(path: Path, changes: Sequence[str] = ()) -> Recipe:
    """Read a recipe; `changes` are `key=value` pairs that replace or add options."""
    options, lines = _mapping(path)
    for change in changes:
        key, value = _change(change)
        options[key] = value
        lines.pop(key, None)
    command = options.pop("command", None)
    if not isinstance(command, str):
        raise InvalidInput(f"{path}: a recipe names its command, as in `command: doctor`")
    return Recipe(path, command, options, lines)


def bind(recipe: Recipe, function: Callable[..., None]) -> dict[str, Any]:
    """The recipe's options as arguments of the command's function, every one checked.

    What the recipe leaves out stays out, so that the function's own defaults hold.
    """
    kinds = _kinds(function)
    for key in recipe.options:
        if key not in kinds:
            near = nearest(key, list(kinds))
            raise InvalidInput(f"{recipe.where(key)}: {recipe.command} has no option {key!r}{near}")
    for name, parameter in inspect.signature(function).parameters.items():
        if name not in recipe.options and parameter.default is parameter.empty:
            raise InvalidInput(f"{recipe.path}: {recipe.command} needs {name!r}")
    return {key: _checked(recipe, key, kinds[key]) for key in recipe.options}


def nearest(word: str, known: Sequence[str]) -> str:
    """` (did you mean 'x'?)`, or all that there is when nothing is near."""
    near = get_close_matches(word, known, n=1)
    return f" (did you mean {near[0]!r}?)" if near else f" (there are {', '.join(known)})"


def _kinds(function: Callable[..., None]) -> dict[str, Any]:
    """The type of each parameter, with the bounds that Typer would check."""
    hints = get_type_hints(function, include_extras=True)
    return {name: _kind(hints[name]) for name in inspect.signature(function).parameters}


def _kind(hint: Any) -> Any:
    if get_origin(hint) is not Annotated:
        return hint
    bare, info, *_ = get_args(hint)
    bounds = {"ge": getattr(info, "min", None), "le": getattr(info, "max", None)}
    return Annotated[bare, Field(**{k: v for k, v in bounds.items() if v is not None})]


def _checked(recipe: Recipe, key: str, kind: Any) -> Any:
    """The value of an option: of the right type to the letter, for YAML's `no` is no text."""
    try:
        return TypeAdapter(kind).validate_python(_located(recipe, key, kind), strict=True)
    except ValidationError as error:
        said = error.errors()[0]["msg"].removeprefix("Input ")
        value = recipe.options[key]
        raise InvalidInput(f"{recipe.where(key)}: {key} {said}, and is {value!r}") from None


def _located(recipe: Recipe, key: str, kind: Any) -> Any:
    """The value, and if it is a relative path of the file, made relative to the file's own folder.

    A text is taken for a path when it begins with a dot, for a model can be a folder or a name.
    What came by `--set` was typed in the shell, and stays relative to where that is.
    """
    value = recipe.options[key]
    if not isinstance(value, str):
        return value
    typed_in_the_shell = key not in recipe.lines
    folder = Path() if typed_in_the_shell else recipe.path.absolute().parent
    if _wants_path(kind):
        return Path(os.path.normpath(folder / Path(value).expanduser()))
    if typed_in_the_shell or not value.startswith(("./", "../")):
        return value
    return os.path.normpath(folder / value)


def _wants_path(kind: Any) -> bool:
    return kind is Path or any(map(_wants_path, get_args(kind)))


def _mapping(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The file's mapping, and the line of each of its keys."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InvalidInput(f"{path} is no text file in UTF-8") from None
    try:
        content = yaml.load(text, Loader=_OnceOnly)
        lines = _lines(text)
    except yaml.YAMLError as error:
        raise InvalidInput(f"{path} is no YAML: {_complaint(error)}") from None
    except (RecursionError, ValueError) as error:
        raise InvalidInput(f"{path} is no YAML that Pliant reads: {error}") from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise InvalidInput(f"{path} is no recipe: it holds `key: value` lines, one of them command")
    return content, lines


class _OnceOnly(yaml.SafeLoader):
    """The safe loader, which also refuses a key that is given twice: YAML would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # a list or a mapping as a key: refused below as unhashable
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value!r} is given twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


def _lines(text: str) -> dict[str, int]:
    tree = yaml.compose(text, Loader=yaml.SafeLoader)
    if not isinstance(tree, yaml.MappingNode):
        return {}
    return {key.value: key.start_mark.line + 1 for key, _ in tree.value}


def _complaint(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    return f"line {mark.line + 1}: {problem}" if mark is not None else problem


def _change(change: str) -> tuple[str, Any]:
    key, equals, value = change.partition("=")
    if not equals or not key:
        raise InvalidInput(f"--set {change!r}: write it as key=value")
    try:
        return key.strip().replace("-", "_"), yaml.load(value, Loader=_OnceOnly)
    except yaml.YAMLError as error:
        raise InvalidInput(f"--set {change!r}: {_complaint(error)}") from None
