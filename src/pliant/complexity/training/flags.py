"""A dataclass is a command line: a flag for each field, whose help is the docstring under it."""

from __future__ import annotations

import argparse
import ast
import inspect
import sys
import textwrap
import types
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from pliant.errors import InvalidInput


class Flags(argparse.ArgumentParser):
    """Reads `--name value` into dataclasses; whatever is wrong is one line and exit code 2."""

    def __init__(self, program: str, about: str, *kinds: type) -> None:
        super().__init__(prog=program, description=about, allow_abbrev=False)
        self.kinds = kinds
        for kind in kinds:
            self._add(kind)

    def read(self, arguments: Sequence[str] | None = None) -> list[Any]:
        """One instance of each dataclass; what is not given keeps its default."""
        given = vars(self.parse_args(arguments))
        return [kind(**{f.name: given[f.name] for f in _of(kind, given)}) for kind in self.kinds]

    def error(self, message: str) -> NoReturn:
        print(f"error: {message}. See {self.prog} --help", file=sys.stderr)
        raise SystemExit(2)

    def _add(self, kind: type) -> None:
        hints, helps = get_type_hints(kind), _docstrings(kind)
        group = self.add_argument_group(kind.__name__)
        for f in fields(kind):
            default = argparse.SUPPRESS
            said = f"{helps.get(f.name, '')} (default: {f.default})".strip().replace("%", "%%")
            options = _options(hints[f.name])
            group.add_argument(f"--{f.name}", default=default, help=said, **options)


def _of(kind: type, given: dict[str, Any]) -> list[Any]:
    return [f for f in fields(kind) if f.name in given]


def _options(hint: Any) -> dict[str, Any]:
    """How argparse takes a value of this type."""
    if get_origin(hint) in (Union, types.UnionType):
        inner = next(part for part in get_args(hint) if part is not type(None))
        return _options(inner)
    if get_origin(hint) is Literal:
        return {"choices": get_args(hint)}
    if get_origin(hint) is tuple:
        return {"type": get_args(hint)[0], "nargs": "*", "action": _AsTuple}
    if hint is bool:
        return {"type": _bool, "nargs": "?", "const": True, "metavar": "true|false"}
    return {"type": hint, "metavar": hint.__name__.upper()}


class _AsTuple(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        setattr(namespace, self.dest, tuple(values))


def _bool(text: str) -> bool:
    known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in known:
        raise argparse.ArgumentTypeError(f"{text!r}: give true or false")
    return known[text.lower()]


def _docstrings(kind: type) -> dict[str, str]:
    """The docstring under each field, from the source."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    if not isinstance(body, ast.ClassDef):
        raise InvalidInput(f"{kind.__name__} is no class with a source")
    said: dict[str, str] = {}
    for this, after in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(this, ast.AnnAssign)
            and isinstance(this.target, ast.Name)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
        ):
            said[this.target.id] = " ".join(str(after.value.value).split())
    return said
