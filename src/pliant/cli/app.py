"""From `pliant ...` to an exit code: find the command, run it, report its error.

Only the module of the named command is imported, and that module imports its heavy libraries when
it runs: `pliant --help`, `--version` and a mistyped flag never wait for torch.

Exit codes: 0 success; 1 a bug in Pliant; 2 something the user can fix; 130 interrupted; 141 the
program that read our output has closed the pipe.
"""

from __future__ import annotations

import inspect
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
from pliant.cli.flags import GroupedCommand, plain_flags, typer_command, width, without_underscores
from pliant.errors import PliantError, SlowDtypeWarning
from pliant.options import Command

# Every command and its line in `pliant --help`. `pliant.cli.<name>` has a function of that name;
# its parameter is the dataclass of its options (`pliant.options`), and its docstring the help, with
# an example at the end.
COMMANDS = {
    "demo": "Two embedded models answer: who is right, and at what cost?",
    "doctor": "Show what Pliant can do with a model, from its config alone.",
    "expert": "Specialities in small files: train, pick, mix, merge.",
    "export": "Write a model with saved gates as a smaller stock model.",
    "gradients": "Audit selective training: does it help? Which tokens train?",
    "importance": "Score every head, channel, expert or layer of a model.",
    "models": "Real models by name: list, get, path, remove.",
    "prune": "Remove what a model can spare; write a smaller stock model.",
    "recover": "Train a smaller model until it predicts as the whole one did.",
    "route": "Send each prompt to the model that it needs: label, fit, ask.",
    "run": "Run a command from a recipe: a YAML file with its options.",
    "score": "Score how hard prompts are, with a saved scorer or router.",
    "train": "Train a language model or a scorer; killed, it resumes.",
}
# Those that are groups: modules with HELP, a table COMMANDS like the one above, and a function for
# each; packages have a module for each, unless MODULES names another. Modules and functions have
# underscores where commands have hyphens. With a DEFAULT, that command runs when none is named.
GROUPS = ("expert", "gradients", "models", "route", "train")
HELP_FLAGS = ("-h", "--help")
WIDE = 100
"""From so many columns on, a terminal shows a help in panels."""
COMPLETION = "_PLIANT_COMPLETE"
"""What a shell sets to ask how a line goes on: `pliant --show-completion` prints how."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and end the process."""
    if COMPLETION in os.environ:
        complete()
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    sys.exit(outcome([word for word in arguments if word != "--debug"], debug))


def complete() -> None:
    """Answer a shell that asks how a line may go on, and end the process.

    Shells give the line in one of two variables. The default command of a group is written out in
    it, so that its options are known.
    """
    line = os.environ.get("_TYPER_COMPLETE_ARGS") or os.environ.get("COMP_WORDS", "")
    words = line.split()[1:]
    if words and (full := with_default(words)) != words:
        os.environ["_TYPER_COMPLETE_ARGS"] = os.environ["COMP_WORDS"] = f"pliant {' '.join(full)}"
        os.environ["COMP_CWORD"] = str(int(os.environ.get("COMP_CWORD", "0")) + 1)
        words = full
    names = [without_underscores(word) for word in words if not word.startswith("-")]
    get_command(application(*names[:2])).main(prog_name="pliant")


def run_program(command: Command, name: str, arguments: Sequence[str] | None = None) -> None:
    """Run a program of one command, such as `python -m pliant.complexity`, like a `pliant` command.

    Returns if it succeeds, else ends the process with the exit code.
    """
    app = _group()
    app.command(cls=GroupedCommand, **_help(command.__doc__))(typer_command(command))

    def run() -> None:
        given = plain_flags(command, sys.argv[1:] if arguments is None else arguments)
        parser = get_command(app)
        with parser.make_context(name, given) as context:
            parser.invoke(context)

    if code := exit_code(run):
        sys.exit(code)


def outcome(arguments: list[str], debug: bool = False) -> int:
    """Run a `pliant` command; returns its exit code."""
    return exit_code(lambda: invoke(arguments or ["--help"]), debug)


def exit_code(run: Callable[[], None], debug: bool = False) -> int:
    """Turn whatever ends the function into an exit code and at most one line on stderr."""
    terminal.hush_libraries()
    try:
        with terminal.shown_warnings(SlowDtypeWarning):
            run()
        sys.stdout.flush()
    except typer.Exit as end:
        return end.exit_code
    except (KeyboardInterrupt, typer.Abort) as end:
        terminal.complain(f"interrupted; {end}" if str(end) else "interrupted")
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
    """Parse the arguments and call the command; errors are raised."""
    arguments = with_default(arguments)
    names = [without_underscores(word) for word in arguments if not word.startswith("-")]
    command = get_command(application(*names[:2]))
    with command.make_context("pliant", arguments) as context:
        command.invoke(context)


def with_default(arguments: list[str]) -> list[str]:
    """The arguments with the default command of a group, or `--help`, where no command follows."""
    group, *rest = arguments
    if group not in GROUPS:
        return arguments
    if not rest:
        return [group, "--help"]
    default: str | None = getattr(_module(group), "DEFAULT", None)
    if default is None or not rest[0].startswith("-") or rest[0] in HELP_FLAGS:
        return arguments
    return [group, default, *rest]


def application(command: str | None = None, subcommand: str | None = None) -> typer.Typer:
    """The whole command line, in which only the named command is more than a line of help."""
    app = _group(name="pliant", add_completion=True)
    app.callback()(root)
    for name, line in COMMANDS.items():
        if name == command and name in GROUPS:
            app.add_typer(group(name, subcommand), name=name)
        else:
            _add(app, name, line, real=name == command)
    return app


def group(name: str, command: str | None) -> typer.Typer:
    """One group of commands, in which only the named command is more than a line of help."""
    inner = _group(short_help=COMMANDS[name], **_help(_module(name).HELP))
    inner.callback()(lambda: None)  # so that a group of one command is a group
    for each, line in _module(name).COMMANDS.items():
        _add(inner, each, line, real=each == command, path=f"{name} {each}")
    return inner


def names() -> list[str]:
    """Every command that can be run, those of a group as `group command`."""
    plain = [n for n in COMMANDS if n not in GROUPS or hasattr(_module(n), "DEFAULT")]
    return plain + [f"{name} {command}" for name in GROUPS for command in _module(name).COMMANDS]


def command_function(name: str) -> Command:
    """The function behind a command, or behind a group's default; this imports its module."""
    if name in GROUPS:
        name = f"{name} {_module(name).DEFAULT}"
    function: Command = getattr(_module(name), name.split()[-1].replace("-", "_"))
    return function


def _group(**about: Any) -> typer.Typer:
    about = {"add_completion": False, **about}
    return typer.Typer(
        # In the panels of a narrow terminal, the text of an option would be a narrow column.
        rich_markup_mode="rich" if sys.stdout.isatty() and width() >= WIDE else None,
        context_settings={
            "help_option_names": list(HELP_FLAGS),
            "token_normalize_func": without_underscores,
            "max_content_width": width(),
        },
        **about,
    )


def _add(app: typer.Typer, name: str, line: str, real: bool, path: str | None = None) -> None:
    if real:
        function = command_function(path or name)
        about = {"short_help": line, **_help(function.__doc__)}
        app.command(name, cls=GroupedCommand, **about)(typer_command(function))
    else:
        app.command(name, help=line)(_listed_only)


def _module(name: str) -> Any:
    """The module of a command or a group; the commands of some groups share one."""
    group, _, command = name.partition(" ")
    module = import_module(f"pliant.cli.{group}")
    if not (command and hasattr(module, "__path__")):
        return module
    home = getattr(module, "MODULES", {}).get(command, command.replace("-", "_"))
    return import_module(f"pliant.cli.{group}.{home}")


def _help(doc: str | None) -> dict[str, Any]:
    """A docstring as a help and its last paragraph, which is an example, as an epilog."""
    text, mark, example = inspect.cleandoc(doc or "").rpartition("Example: ")
    paragraphs = [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]
    return {"help": "\n\n".join(paragraphs), "epilog": mark + " ".join(example.split())}


def _listed_only() -> None:
    raise AssertionError("only the command that is named can be called")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pliant {__version__}")
        raise typer.Exit


def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error (with any command).")
    ] = False,
) -> None:
    """Make any causal language model spend its compute where it matters.

    MODEL is the name of an embedded model (nano-s, nano-l), a local folder or a name on the hub.
    """


def is_the_users(error: Exception) -> bool:
    """Whether the user can fix it: a wrong argument, model or file, a full disk."""
    kinds = (PliantError, typer.TyperException, OSError)
    return isinstance(error, kinds) or _needs_memory(error)


def _needs_memory(error: Exception) -> bool:
    """Whether there is not enough of it; torch says so in several ways."""
    signs = ("can't allocate memory", "out of memory", "Storage size calculation overflowed")
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in signs)


def explanation(error: Exception) -> str:
    """One line: what happened and, where we know it, what to do."""
    if isinstance(error, typer.TyperException):
        return _usage_line(error)
    if isinstance(error, PliantError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        where = f": {os.fspath(error.filename)}" if error.filename else ""
        return f"{error.strerror}{where}"
    if _needs_memory(error):
        reason = " ".join(str(error).split())[:200]
        return f"not enough memory ({reason}): give smaller numbers, or a smaller model"
    kind = type(error).__name__
    return f"{kind}: {error} (a bug in Pliant; please report it with the output of --debug)"


def _usage_line(error: typer.TyperException) -> str:
    """Typer's message, then where to read more."""
    context = getattr(error, "ctx", None)
    line = error.format_message().replace("Value error, ", "").rstrip(".")
    path = context.command_path if context is not None else "pliant"
    end = "" if line.endswith("?") else "."
    return f"{line}{end} See {path} --help"
