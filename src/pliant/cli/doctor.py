"""`pliant doctor MODEL`: what each part of Pliant can do with a model, from its config alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING, Annotated

import typer

from pliant.cli import terminal
from pliant.reports.tables import Table, count, size

if TYPE_CHECKING:
    from pliant.survey import Examination, Sizes

TITLES = {
    "foundation": "Does Pliant know its way about in it?",
    "complexity": "Complexity and routing: a score from the prompt's own prefill",
    "structure": "Structure: gates on heads, layers and channels",
    "experts": "Experts: projections turned by a few numbers each",
    "gradients": "Gradients: a loss on chosen tokens alone",
}
EXAMPLE = "pliant doctor nano-l --json"


def doctor(
    model: Annotated[str, typer.Argument(help="nano-s, nano-l, a folder, or a name on the hub.")],
    json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Say what Pliant can do with a model, and why not, from its config alone.

    No weights are read: it takes seconds, and works for a model that this machine cannot hold. What
    a model can do is found by doing it, on a tiny copy of the same structure.
    """
    from pliant import loading

    config = loading.load_config(model)
    from pliant.survey import examine  # after a name that is no model: this takes seconds

    found = examine(config)
    if json:
        terminal.print_json({"model": model, **asdict(found)})
    else:
        for table in tables(model, found):
            table.draw(terminal.console())


def tables(name: str, found: Examination) -> Iterator[Table]:
    """What is drawn, in this order: what the model is, what it can do, what that would cost."""
    if found.sizes is not None:
        title = f"{name}: {found.architecture}, transformers {found.transformers_version}"
        yield Table(title, ["what", "how much"], list(size_rows(found.sizes)))
    for part, findings in groupby(found.findings, key=lambda finding: finding.part):
        yield Table(
            TITLES[part],
            ["question", "answer", "why not, or when"],
            [[f.question, "yes" if f.ok else "no", f.reason] for f in findings],
            colours={"yes": "green", "no": "red"},
        )
    if found.estimates:
        yield Table(
            "What each part would add to memory (by formula; nothing was allocated)",
            ["part", "what", "size", "formula"],
            [[e.part, e.what, size(e.bytes), e.formula] for e in found.estimates],
            right=frozenset({"size"}),
        )


def size_rows(sizes: Sizes) -> Iterator[list[str]]:
    layers = sizes.layer_parameters
    yield ["parameters", count(sizes.parameters)]
    yield ["  in the embeddings and the head", count(sizes.embedding_parameters)]
    yield ["  in a layer", span([count(min(layers)), count(max(layers))])]
    weights = (f"{size(octets)} in {kind}" for kind, octets in sizes.bytes.items())
    yield ["weights", ", ".join(weights)]
    yield ["layers", f"{sizes.layers}, {sizes.attention_layers} of them with attention"]
    yield ["hidden size", f"{sizes.hidden_size:,}"]
    yield ["vocabulary", f"{sizes.vocabulary:,}"]
    if sizes.heads:
        heads = f"{span(sizes.heads)}, over {span(sizes.kv_heads)} of keys and values"
        yield ["attention heads", heads]
    if sizes.cache_bytes_per_token:
        yield ["cache for a token", f"{size(sizes.cache_bytes_per_token)} in bf16"]
    if sizes.state_bytes:
        yield ["state of a sequence", f"{size(sizes.state_bytes)} in bf16, whatever its length"]


def span(values: Sequence[object]) -> str:
    """`8`, or `8 to 16` where they differ."""
    first, last = str(values[0]), str(values[-1])
    return first if first == last else f"{first} to {last}"
