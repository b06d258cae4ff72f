"""`pliant expert list FOLDER`: the experts in a folder, their bases, sizes and layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pliant.cli import terminal
from pliant.errors import AdapterError, PliantError
from pliant.options import Flag
from pliant.reports.tables import Table, size

if TYPE_CHECKING:
    from pliant.experts import Expert


@dataclass(frozen=True, kw_only=True)
class ListOptions:
    folder: Annotated[Path, Flag(positional=True)]
    """A folder with a folder for each expert, or one expert's own."""
    json: bool = False
    """Print one JSON document."""


def list(options: ListOptions) -> None:
    """Show the experts in a folder: their bases, their sizes, and what they change.

    The norm is that of z - 1 over all parameters: 0 is the base.

    Example: pliant expert list experts --json
    """
    from pliant.experts.folder import CONFIG

    root = options.folder.expanduser()
    if not root.is_dir():
        raise AdapterError(f"{root}: no such folder")
    folders = [f for f in (root, *sorted(root.iterdir())) if (f / CONFIG).is_file()]
    rows, problems = [], []
    for folder in folders:
        if not _is_expert(folder / CONFIG):
            continue
        try:
            rows.append(_facts(folder, root))
        except PliantError as error:
            problems.append(str(error))
    if not rows and not problems:
        raise AdapterError(f"{root}: holds no expert (looked for {CONFIG}, here and one below)")
    if options.json:
        terminal.print_json({"experts": rows, "unreadable": problems})
        return
    terminal.draw([_table(rows)] if rows else [], problems)


def _is_expert(path: Path) -> bool:
    """Whether it is one at least by its own account; other adapters may lie beside it."""
    import json

    try:
        return json.loads(path.read_bytes()).get("peft_type") == "SVF"
    except (OSError, ValueError, AttributeError, RecursionError):
        return True  # reading it as an expert says what is wrong


def _facts(folder: Path, root: Path) -> dict[str, Any]:
    from pliant.experts import Expert
    from pliant.experts.comparison import Profile
    from pliant.experts.folder import WEIGHTS

    expert = Expert.load(folder)
    profile = Profile.of(expert)
    return {
        "name": folder.resolve().name if folder == root else folder.name,
        "base": _base(expert),
        "bytes": (folder / WEIGHTS).stat().st_size,
        "numbers": expert.numbers,
        "norm": profile.norm,
        "rank": expert.settings.get("rank"),
        "layers": profile.layers,
        "projections": [*profile.grid()],
    }


def _base(expert: Expert) -> str:
    """Its public name, or else the class of the model."""
    if expert.base is not None:
        return expert.base.name or expert.base.model
    return expert.base_name or "unknown"


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    head = ["expert", "base", "size", "parameters", "rank", "norm", "layers", "projections"]
    cells = [
        [
            row["name"],
            row["base"],
            size(row["bytes"]),
            f"{row['numbers']:,}",
            "all" if row["rank"] is None else str(row["rank"]),
            f"{row['norm']:.3g}",
            ", ".join(_ranges(row["layers"])) or "none",
            ", ".join(sorted({name.rpartition(".")[2] for name in row["projections"]})),
        ]
        for row in rows
    ]
    return Table("experts", head, cells, right=frozenset({"size", "parameters", "rank", "norm"}))


def _ranges(layers: Sequence[int]) -> Iterator[str]:
    """`0-3, 7`"""
    start = 0
    for i, layer in enumerate(layers):
        if i + 1 == len(layers) or layers[i + 1] != layer + 1:
            yield f"{layers[start]}-{layer}" if i > start else str(layer)
            start = i + 1
