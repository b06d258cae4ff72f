"""`pliant doctor MODEL`: what each part of Pliant can do with a model, from its config alone."""

from __future__ import annotations

from typing import Annotated

import typer

EXAMPLE = "pliant doctor nano-l --json"


def doctor(
    model: Annotated[str, typer.Argument(help="nano-s, nano-l, a folder, or a name on the hub.")],
    json: Annotated[bool, typer.Option(help="One JSON document.")] = False,
) -> None:
    """Say what Pliant can do with a model, and why not, from its config alone.

    No weights are read: it takes seconds, and works for a model that this machine cannot hold.
    """
    from pliant import loading

    loading.load_config(model)
