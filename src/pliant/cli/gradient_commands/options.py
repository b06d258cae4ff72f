"""The options that training, auditing and showing share: which model and data, which tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Option(help="nano-s, nano-l, a folder, or a name on the hub.")]
Data = Annotated[
    str,
    typer.Option(
        help="Text (.txt), rows with text, prompt and completion, or messages (.jsonl, ...), a hub "
        "data set (name:split), or nano: questions of the embedded world."
    ),
]
Engine = Annotated[
    str, typer.Option(help="sparse, exact or completion: how the chosen tokens are trained.")
]
Ratio = Annotated[float, typer.Option(help="The share of a row's tokens that is trained.")]
Selection = Annotated[
    str | None, typer.Option(help="How they are chosen: sampled, uniform, topk, all, ...")
]
Score = Annotated[str | None, typer.Option(help="By what: gradient, loss, entropy, margin, ...")]
Choose = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=VALUE", help="Any other setting of GradientConfig; repeatable."),
]
Length = Annotated[int, typer.Option(help="Tokens of a piece of text, at most.", min=2)]
Rows = Annotated[int | None, typer.Option(help="Read only so many rows.", min=1)]
Subset = Annotated[str | None, typer.Option(help="Of a data set on the hub.")]
Lora = Annotated[
    int | None, typer.Option(help="Train low-rank matrices of this rank alone.", min=1)
]
Dtype = Annotated[str, typer.Option(help="Of the weights: float32, bfloat16, ...")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...")]
Page = Annotated[Path | None, typer.Option(help="Write an HTML page, too.", dir_okay=False)]
Json = Annotated[bool, typer.Option("--json", help="The result as one JSON document.")]
