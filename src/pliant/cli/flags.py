"""From the options of a command to its flags, and to a help in groups.

An option that several commands have means the same in each, so its name tells the heading that it
stands under.
"""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Annotated, Any, get_args

import typer
from typer.core import TyperCommand

from pliant import options
from pliant.options import Command, Option

HEADINGS = {
    "Input": (
        "model model_name base teacher scorer router expert experts adapters prompts prompt data "
        "task file shots test evaluate evaluation_data evaluation labels classifier source rows "
        "limit subset group text_column prompt_column completion_column answer_column "
        "messages_column label_column question_column right_column cost_column unit group_column "
        "wording_column data_size evaluation_size tokens texts length max_length truncate "
        "truncation messages chat"
    ),
    "Method": "batch_size evaluation_batch_size seed set choose",
    "Output": (
        "all out output_dir resume report page picture heatmap logging_dir report_to logging_steps "
        "save_epochs zeros shard_size ledger json"
    ),
    "Machine": ("device dtype stream concurrency timeout tries api_key_env prefixes prefix_folder"),
}
"""The headings of a help in their order, and the options that stand under each, in their order.
Options without a heading come first under Method."""
WIDEST = 36
"""More characters of choices stand in the text of the help, which wraps."""


def heading(option: Option) -> str:
    """The heading that an option stands under in the help."""
    if option.flag.group:
        return option.flag.group
    return next((h for h, names in HEADINGS.items() if option.name in names.split()), "Method")


class GroupedCommand(TyperCommand):
    """A command whose help has its options under headings in a pipe, too."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            default = "Arguments" if parameter.param_type_name == "argument" else "Options"
            section = getattr(parameter, "rich_help_panel", None) or default
            if record := parameter.get_help_record(ctx):
                sections.setdefault(section, []).append(record)
        for section, records in sections.items():
            with formatter.section(section):
                formatter.write_dl(records)

    def get_help_option(self, ctx: Any) -> Any:
        option = super().get_help_option(ctx)
        if option is not None:
            option.rich_help_panel = [*HEADINGS][-1]
        return option


def width() -> int:
    """Of the terminal, which a help fills."""
    return shutil.get_terminal_size().columns


def typer_command(command: Command) -> Callable[..., None]:
    """A function with one parameter an option, as typer wants it, that calls the command."""

    def run(**values: Any) -> None:
        for option in options.of(command):
            option.check(values[option.name], _shown(option))
        options.call(command, {o.name: _value(o, values[o.name]) for o in options.of(command)})

    parameters = [_parameter(option) for option in sorted(options.of(command), key=_place)]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    run.__doc__ = command.__doc__
    return run


def _place(option: Option) -> tuple[bool, int, bool, int]:
    """Positional ones first; then by heading, those that are required before the others."""
    under = heading(option)
    names = HEADINGS[under].split()
    at = names.index(option.name) + 1 if option.name in names else 0
    if option.flag.positional:
        return (False, 0, not option.required, 0)
    return (True, [*HEADINGS].index(under), not option.required, at)


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
    kind = option.type if option.item_type is None else list[_item_kind(option)]  # type: ignore[misc]
    default = inspect.Parameter.empty if option.required else option.default
    if option.optional or (option.item_type is not None and option.flag.positional):
        kind = kind | None
    mark = option.flag
    argument = typer.Argument(help=option.help, metavar=mark.metavar, hidden=mark.hidden)
    info = argument if mark.positional else _named(option)
    return inspect.Parameter(
        option.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[kind, info],
    )


def _item_kind(option: Option) -> Any:
    """The type of a value of an option that takes several; typer knows no list of literals."""
    choices = get_args(option.item_type)
    return Enum(option.name, {str(c): c for c in choices}) if choices else option.item_type


def _named(option: Option) -> Any:
    name, item = _flag(option.name), option.item_type
    # Of an option that is given several times, the type of one value; else typer's own.
    metavar = option.flag.metavar or (None if item is None else f"<{_kind_of(item)}>")
    help = option.help
    choices = "|".join(map(str, option.choices or get_args(item)))
    if len(choices) > WIDEST:
        metavar, help = "<choice>", f"{help} Choices: {choices.replace('|', ', ')}."
    if option.type is bool and option.default is not False:
        name = f"{name}/--no-{name.removeprefix('--')}"
    return typer.Option(
        name,
        *option.flag.aliases,
        help=help.strip(),
        metavar=metavar,
        hidden=option.flag.hidden,
        rich_help_panel=heading(option),
        min=option.least,
        max=option.most,
    )


def _kind_of(item: Any) -> str:
    return "|".join(map(str, get_args(item))) or str(item.__name__)


def _value(option: Option, value: Any) -> Any:
    if option.item_type is None:
        return value
    return tuple(v.value if isinstance(v, Enum) else v for v in value or ())


def _shown(option: Option) -> str:
    """How an option is written in the help."""
    return option.name.upper() if option.flag.positional else _flag(option.name)


def _flag(name: str) -> str:
    return "--" + without_underscores(name)
