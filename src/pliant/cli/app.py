"""What happens between `pliant ...` and its exit code: which command, and what becomes of an error.

Only the module of the command that was asked for is imported, and that module imports its heavy
libraries when it runs: `pliant --help`, `--version` and a mistyped flag never wait for torch.

Exit codes: 0 done; 1 a fault of Pliant's own; 2 something the user can mend; 130 interrupted;
141 the reader of our output went away.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.main import get_command

from pliant import __version__
from pliant.cli import terminal
from pliant.errors import PliantError

# Every command and the line that `pliant --help` shows for it. `pliant.cli.<name>` has a function
# of that name, with its options as parameters, and an EXAMPLE.
COMMANDS = {
    "demo": "Two embedded models answer: who is right, and at what cost?",
    "doctor": "What Pliant can do with a model, told from its config alone.",
    "gradients": "Which tokens train: does it help, and which are they?",
    "route": "Send each prompt to the model that it needs: label, fit, ask.",
    "run": "Run a command from a recipe: its options, kept in a YAML file.",
    "score": "How hard are prompts, as a saved scorer or router sees it?",
    "train": "Train a model on the tokens that are worth a gradient.",
}
# Those that are groups, and where the functions of their commands are. The group's own module has
# a table COMMANDS like the one above, and an EXAMPLE.
GROUPS = {"gradients": "gradient_commands", "route": "routes"}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and end the process."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    sys.exit(outcome([word for word in arguments if word != "--debug"], debug))


def outcome(arguments: list[str], debug: bool = False) -> int:
    """Run a command and turn whatever ends it into an exit code and at most one line."""
    terminal.hush_libraries()
    try:
        invoke(arguments or ["--help"])
        sys.stdout.flush()
    except typer.Exit as end:
        return end.exit_code
    except (KeyboardInterrupt, typer.Abort):
        terminal.complain("interrupted")
        return 130
    except BrokenPipeError:
        terminal.drop_output()
        return 141
    except Exception as error:
        if debug:
            traceback.print_exc()
        else:
            terminal.complain(explanation(error))
        return 2 if is_the_users(error) else 1
    return 0


def invoke(arguments: list[str]) -> None:
    """Parse the arguments and call the command; errors come out as exceptions."""
    words = [word for word in arguments if not word.startswith("-")]
    if len(arguments) == 1 and arguments[0] in GROUPS:
        arguments = [*arguments, "--help"]
    command = get_command(application(*words[:2]))
    with command.make_context("pliant", arguments) as context:
        command.invoke(context)


def application(asked: str | None = None, inner: str | None = None) -> typer.Typer:
    """The whole command line, in which only the command that is asked for is the real one."""
    app = _group(name="pliant")
    app.callback()(root)
    for name, line in COMMANDS.items():
        if name == asked and name in GROUPS:
            app.add_typer(group(name, inner), name=name)
        else:
            _add(app, name, line, real=name == asked)
    return app


def group(name: str, asked: str | None) -> typer.Typer:
    """One group of commands, of which only the one that is asked for is real."""
    inner = _group(short_help=COMMANDS[name], help=_module(name).HELP, epilog=epilog(name))
    inner.callback()(lambda: None)  # so that a group of one command is a group
    for command, line in _module(name).COMMANDS.items():
        _add(inner, command, line, real=command == asked, path=f"{name} {command}")
    return inner


def names() -> list[str]:
    """Every command that can be run, those of a group as `group command`."""
    plain = [name for name in COMMANDS if name not in GROUPS]
    return plain + [f"{name} {command}" for name in GROUPS for command in _module(name).COMMANDS]


def command_function(name: str) -> Callable[..., None]:
    """The function behind a command; this imports its module."""
    function: Callable[..., None] = getattr(_module(name), name.split()[-1])
    return function


def epilog(name: str) -> str:
    return f"Example: {_module(name).EXAMPLE}"


def _group(**about: Any) -> typer.Typer:
    return typer.Typer(
        add_completion=False,
        rich_markup_mode="rich" if sys.stdout.isatty() else None,
        context_settings={"help_option_names": ["-h", "--help"]},
        **about,
    )


def _add(app: typer.Typer, name: str, line: str, real: bool, path: str | None = None) -> None:
    if real:
        function = command_function(path or name)
        app.command(name, short_help=line, epilog=epilog(path or name))(function)
    else:
        app.command(name, help=line)(_listed_only)


def _module(name: str) -> Any:
    outer, _, inner = name.partition(" ")
    return import_module(f"pliant.cli.{GROUPS[outer]}.{inner}" if inner else f"pliant.cli.{outer}")


def _listed_only() -> None:
    raise AssertionError("a command that was not asked for was called")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pliant {__version__}")
        raise typer.Exit


def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say which Pliant.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the whole traceback of an error (any command).")
    ] = False,
) -> None:
    """Make any causal language model spend its compute where it matters.

    MODEL is the name of an embedded model (nano-s, nano-l), a local folder or a name on the hub.
    """


def is_the_users(error: Exception) -> bool:
    """Whether the user can mend it: a wrong argument, model or file, a disk that is full."""
    return isinstance(error, (PliantError, typer.TyperException, OSError))


def explanation(error: Exception) -> str:
    """One line that says what happened and, where we know it, what to do."""
    if isinstance(error, typer.TyperException):
        return _usage_line(error)
    if isinstance(error, PliantError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        where = f": {os.fspath(error.filename)}" if error.filename else ""
        return f"{error.strerror}{where}"
    kind = type(error).__name__
    return f"{kind}: {error} (a fault of Pliant's; add --debug to see where, and please report it)"


def _usage_line(error: typer.TyperException) -> str:
    """Typer's own sentence, then where to read more."""
    context = getattr(error, "ctx", None)
    line = error.format_message().rstrip(".")
    path = context.command_path if context is not None else "pliant"
    end = "" if line.endswith("?") else "."
    return f"{line}{end} See {path} --help"
