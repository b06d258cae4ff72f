"""`pliant run RECIPE`: a command with its options from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pliant import recipes
from pliant.cli import app
from pliant.errors import InvalidInput

EXAMPLE = "pliant run recipes/doctor.yaml --set model=nano-l"


def run(
    recipe: Annotated[Path, typer.Argument(help="A YAML file: command, and its options.")],
    set: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Replace one option of the recipe; repeatable."),
    ] = None,
) -> None:
    """Run a command from a recipe: its options, kept in a YAML file.

    Relative paths in a recipe are relative to the recipe. A key that the command does not have is
    an error, which names the nearest one that it has.
    """
    wanted = recipes.read(recipe, set or [])
    known = [name for name in app.names() if name != "run"]
    if wanted.command not in known:
        near = recipes.nearest(wanted.command, known)
        raise InvalidInput(f"{wanted.where('command')}: no command {wanted.command!r}{near}")
    function = app.command_function(wanted.command)
    function(**recipes.bind(wanted, function))
