"""`pliant doctor MODEL`: what each part of Pliant can do with a model, from its config alone."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Annotated

from pliant.cli import terminal
from pliant.cli.doctor_sentences import NEEDED, summary
from pliant.options import Flag
from pliant.reports.tables import Table, count, size

if TYPE_CHECKING:
    from pliant.survey import Examination, Sizes

TITLES = {
    "foundation": "Foundation: does Pliant recognise the model's structure?",
    "complexity": "Complexity and routing: a score from the prompt's own prefill",
    "structure": "Structure: gates on heads, layers and channels",
    "experts": "Experts: a few parameters retune each projection",
    "gradients": "Gradients: training on selected tokens only",
}


@dataclass(frozen=True)
class DoctorOptions:
    model: Annotated[str, Flag(positional=True)]
    """nano-s, nano-l, a folder, or a name on the hub."""
    all: bool = False
    """Show every question with its answer, the sizes, and the memory that each part would add."""
    json: bool = False
    """Print one JSON document."""


def doctor(options: DoctorOptions) -> None:
    """Show what Pliant can do with a model, and why not, from its config alone.

    No weights are read: this takes seconds and works for models that do not fit this machine. Each
    answer comes from a trial on a tiny copy of the same structure. --json holds all of them.

    Example: pliant doctor nano-l --all
    """
    from pliant.loading import collector_paused

    with collector_paused():
        _show(options)


def _show(options: DoctorOptions) -> None:
    from pliant import loading

    config = loading.load_config(options.model)
    # Takes seconds, so only once the name is known to be a model.
    from pliant.survey import CAPABILITIES, examine

    every = options.all or options.json
    examination = examine(config, None if every else NEEDED)
    statements = summary(examination, shlex.quote(options.model))
    chats = chat_template_of(options.model)
    if options.json:
        listed = [{**asdict(statement), "text": str(statement)} for statement in statements]
        content = {"model": options.model, "chat_template": chats, "summary": listed}
        terminal.print_json({**content, **examination.as_dict()})
        return
    terminal.draw((), [title(options.model, examination), *map(str, statements)])
    if chats is False:
        terminal.draw((), NO_TEMPLATE)
    if options.all:
        terminal.draw(tables(examination))
    else:
        terminal.print_text(
            f"All {len(CAPABILITIES)} questions with their answers, the sizes, and the memory of "
            f"each part: pliant doctor {shlex.quote(options.model)} --all"
        )


def title(name: str, examination: Examination) -> str:
    layers = "" if examination.sizes is None else f", {examination.sizes.layers} layers"
    total = "" if examination.sizes is None else f", {count(examination.sizes.parameters)} weights"
    kind = f"{examination.architecture}, transformers {examination.transformers_version}"
    return f"{name} ({kind}{total}{layers})"


NO_TEMPLATE = (
    "Its tokenizer has no chat template, so route label asks it the bare prompt, and a base model "
    "may go on with questions of its own. Frame the prompts (--template "
    '"Question: {prompt}\\nAnswer:", --system), and say where an answer ends (--stop "\\n").',
)


def chat_template_of(model: str) -> bool | None:
    """Whether its tokenizer has a chat template; None if it has no tokenizer."""
    from pliant import loading
    from pliant.data import has_chat_template
    from pliant.errors import PliantError

    try:
        return has_chat_template(loading.load_tokenizer(model))
    except PliantError:
        return None


def tables(examination: Examination) -> Iterator[Table]:
    """The model's sizes, what each part can do with it, and the memory that each would need."""
    if examination.sizes is not None:
        yield Table("Sizes", ["what", "how much"], list(size_rows(examination.sizes)))
    for part, findings in groupby(examination.findings, key=lambda finding: finding.part):
        yield Table(
            TITLES[part],
            ["question", "answer", "why not, or when"],
            [[f.question, "yes" if f.ok else "no", f.reason] for f in findings],
            colours={"yes": "green", "no": "red"},
        )
    if examination.estimates:
        yield Table(
            "What each part would add to memory (by formula; nothing was allocated)",
            ["part", "what", "size", "formula"],
            [[e.part, e.what, size(e.bytes), e.formula] for e in examination.estimates],
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
