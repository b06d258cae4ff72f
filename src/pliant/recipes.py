"""A recipe: one command and its options in a strict YAML file.

    command: doctor
    model: nano-l
    json: true

The keys are the command's own options (`pliant.options`), with underscores for dashes. An unknown
key, a value of the wrong type and a key given twice are errors. A path that is not absolute is
relative to the recipe, whatever the working directory is.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pliant import options
from pliant.errors import InvalidInput, did_you_mean
from pliant.options import Command, Option


@dataclass(frozen=True)
class Recipe:
    """The content of a recipe file, not yet checked against the command's options."""

    path: Path
    command: str
    options: Mapping[str, Any]
    lines: Mapping[str, int]

    def where(self, key: str) -> str:
        line = self.lines.get(key)
        return f"{self.path}, line {line}" if line else str(self.path)


def read(path: Path, changes: Sequence[str] = ()) -> Recipe:
    """Read a recipe; `changes` are `key=value` pairs that replace or add options."""
    values, lines = _mapping(path)
    for change in changes:
        key, value = _change(change)
        values[key] = value
        lines.pop(key, None)
    command = values.pop("command", None)
    if not isinstance(command, str):
        raise InvalidInput(f"{path}: a recipe names its command, as in `command: doctor`")
    return Recipe(path, command, values, lines)


def bind(recipe: Recipe, command: Command) -> dict[str, Any]:
    """The arguments for the command's function, from the recipe's options, each one checked.

    What the recipe leaves out keeps the command's default.
    """
    known = {option.name: option for option in options.of(command)}
    for key in recipe.options:
        if key not in known:
            near = did_you_mean(key, known)
            raise InvalidInput(f"{recipe.where(key)}: {recipe.command} has no option {key!r}{near}")
    for option in known.values():
        if option.required and option.name not in recipe.options:
            raise InvalidInput(f"{recipe.path}: {recipe.command} needs {option.name!r}")
    values = {key: _checked(recipe, known[key]) for key in recipe.options}
    return options.arguments(command, values)


def _checked(recipe: Recipe, option: Option) -> Any:
    try:
        return option.from_yaml(_located(recipe, option))
    except InvalidInput as error:
        raise InvalidInput(f"{recipe.where(option.name)}: {error}") from None


def _located(recipe: Recipe, option: Option) -> Any:
    """The value; a relative path in the file becomes relative to the file's own folder.

    A text counts as a path when it begins with a dot, for a model can be a folder or a name. What
    came by `--set` was typed in the shell, and stays relative to the shell's folder.
    """
    value = recipe.options[option.name]
    if not isinstance(value, str):
        return value
    typed_in_the_shell = option.name not in recipe.lines
    folder = Path() if typed_in_the_shell else recipe.path.absolute().parent
    if option.type is Path:
        return Path(os.path.normpath(folder / Path(value).expanduser()))
    if typed_in_the_shell or not value.startswith(("./", "../")):
        return value
    return os.path.normpath(folder / value)


def _mapping(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The file's mapping, and the line of each key."""
    if path.is_char_device():  # some of these never end
        raise InvalidInput(f"{path} is a device: give a file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InvalidInput(f"{path} is not a text file in UTF-8") from None
    try:
        content = yaml.load(text, Loader=_OnceOnly)
        lines = _lines(text)
    except yaml.YAMLError as error:
        raise InvalidInput(f"{path} is not YAML: {_complaint(error)}") from None
    except (RecursionError, ValueError) as error:
        raise InvalidInput(f"{path} is not YAML that Pliant can read: {error}") from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise InvalidInput(
            f"{path} is not a recipe: it needs `key: value` lines, one of them `command`"
        )
    return content, lines


class _OnceOnly(yaml.SafeLoader):
    """The safe loader, but a repeated key is an error: YAML would silently use the last."""

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
