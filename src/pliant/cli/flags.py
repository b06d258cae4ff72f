"""From the options of a command to the flags of its command line."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from pliant import options
from pliant.options import Command, Option


def typer_command(command: Command) -> Callable[..., None]:
    """A function with one parameter an option, as typer wants it, that calls the command."""

    def run(**values: Any) -> None:
        options.call(command, {o.name: _value(o, values[o.name]) for o in options.of(command)})

    required_first = sorted(options.of(command), key=lambda o: (not o.required, o.name == "json"))
    parameters = [_parameter(option) for option in required_first]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    run.__doc__ = command.__doc__
    return run


def without_underscores(token: str) -> str:
    """`--batch_size` is `--batch-size`: the seeds' flags have underscores."""
    return token.replace("_", "-")


def plain_flags(command: Command, arguments: Sequence[str]) -> list[str]:
    """The seeds' way to write values, as ours: `--bias false` and `--class_weights 1 2.5`."""
    by_flag = {_flag(option.name): option for option in options.of(command)}
    runs: list[tuple[str, list[str]]] = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if argument.startswith("--") or not runs:
            runs.append((name, [value] if equals else []))
        else:
            runs[-1][1].append(argument)
    return [
        text
        for name, values in runs
        for text in _plain(by_flag.get(without_underscores(name)), name, values)
    ]


def _plain(option: Option | None, name: str, values: list[str]) -> list[str]:
    if option is not None and option.item_type is not None:
        return [text for value in values for text in (name, value)]
    if option is not None and option.type is bool and values:
        value, *rest = values
        if option.from_text(value):
            return [name, *rest]
        return rest if option.default is False else [f"--no-{name.removeprefix('--')}", *rest]
    return [name, *values]


def _parameter(option: Option) -> inspect.Parameter:
    kind = option.type if option.item_type is None else list[option.item_type]  # type: ignore[name-defined]
    default = inspect.Parameter.empty if option.required else option.default
    if option.optional or (option.item_type is not None and option.flag.positional):
        kind = kind | None
    info = _argument(option) if option.flag.positional else _named(option)
    return inspect.Parameter(
        option.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[kind, info],
    )


def _argument(option: Option) -> Any:
    return typer.Argument(help=option.help, metavar=option.flag.metavar, hidden=option.flag.hidden)


def _metavar(option: Option) -> str | None:
    """Of an option that is given several times the type of one value; else typer's own."""
    item = option.item_type
    return option.flag.metavar or (f"<{item.__name__}>" if item is not None else None)


def _named(option: Option) -> Any:
    name = _flag(option.name)
    if option.type is bool and option.default is not False:
        name = f"{name}/--no-{name.removeprefix('--')}"
    return typer.Option(
        name,
        *option.flag.aliases,
        help=option.help,
        metavar=_metavar(option),
        hidden=option.flag.hidden,
        min=option.least,
        max=option.most,
    )


def _value(option: Option, value: Any) -> Any:
    return tuple(value or ()) if option.item_type is not None else value


def _flag(name: str) -> str:
    return "--" + without_underscores(name)
