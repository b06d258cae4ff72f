"""`pliant run RECIPE`: a command with its options from a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pliant import recipes
from pliant.cli import app
from pliant.errors import InvalidInput, did_you_mean
from pliant.options import Flag


@dataclass(frozen=True)
class RunOptions:
    recipe: Annotated[Path, Flag(positional=True)]
    """A YAML file with a command and its options."""
    set: Annotated[tuple[str, ...], Flag(metavar="KEY=VALUE")] = ()
    """Replace one option of the recipe; repeatable. Default: as the recipe has it."""


def run(options: RunOptions) -> None:
    """Run a command from a recipe: a YAML file with its options.

    Relative paths in a recipe are relative to the recipe. An unknown key is an error that names the
    nearest option of the command.

    Example: pliant run recipes/doctor.yaml --set model=nano-l
    """
    recipe = recipes.read(options.recipe, options.set)
    commands = [name for name in app.names() if name != "run"]
    if recipe.command not in commands:
        near = did_you_mean(recipe.command, commands)
        raise InvalidInput(f"{recipe.where('command')}: no command {recipe.command!r}{near}")
    command = app.command_function(recipe.command)
    command(**recipes.bind(recipe, command))
