"""`pliant route label`: run models over prompts and write down who was right, and at what cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EXAMPLE = (
    "pliant route label --prompts questions.jsonl --model nano-s --model nano-l --out labels.jsonl"
)


def label(
    prompts: Annotated[Path, typer.Option(help="The prompts: JSONL, CSV or a data set.")],
) -> None:
    """Run models over prompts: who is right, and at what cost?"""
    from pliant.errors import InvalidInput

    raise InvalidInput(f"{prompts}: labelling is not there yet")
