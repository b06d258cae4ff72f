"""`pliant expert show EXPERT`: what an expert changes, by layer and projection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pliant.cli import terminal
from pliant.errors import InvalidInput
from pliant.options import Flag
from pliant.reports.tables import Table

if TYPE_CHECKING:
    from pliant.experts.comparison import Comparison, Grid, Profile
    from pliant.experts.expert import Expert, Scales


@dataclass(frozen=True, kw_only=True)
class ShowOptions:
    expert: Annotated[str, Flag(positional=True)]
    """An expert's folder."""
    other: Annotated[str | None, Flag(aliases=("--with",))] = None
    """Another expert's folder: show where the two differ. Default: none."""
    base: str | None = None
    """Its base: then a change is relative to the weight. Default: none, the change of z alone."""
    heatmap: Path | None = None
    """Write a heat map by layer and projection to this file (.html or .svg). Default: none."""
    json: bool = False
    """Print one JSON document."""


def show(options: ShowOptions) -> None:
    """Show how much an expert changes each projection of each layer, or where two experts differ.

    Without a base, a change is the root mean square of z - 1. With one, it is the size of what is
    added to the weight, relative to the weight.

    Example: pliant expert show math --with code --heatmap differences.html
    """
    _check_file(options.heatmap)
    from pliant.experts.comparison import Comparison, Profile
    from pliant.experts.expert import Expert

    expert = Expert.load(options.expert)
    other = None if options.other is None else Expert.load(options.other)
    scales = None if options.base is None else _scales(expert, other, options.base)
    result: Profile | Comparison
    if other is None:
        result = Profile.of(expert, scales)
    else:
        result = Comparison.of(expert, other, scales, _names(options))
    if options.heatmap is not None:
        _write(options.heatmap, options.expert, result)
    if options.json:
        terminal.print_json({"expert": options.expert, **result.as_dict()})
    else:
        terminal.draw([_table(result)], [f"{options.expert}: {result}"])


def _names(options: ShowOptions) -> tuple[str, str]:
    """The folders' own names, if these differ."""
    assert options.other is not None
    own, other = Path(options.expert), Path(options.other)
    if own.name and own.name != other.name:
        return own.name, other.name
    return str(own), str(other)


def _scales(expert: Expert, other: Expert | None, base: str) -> Scales:
    """The singular values of all weights that either changes."""
    from pliant.experts.factors import singular_values
    from pliant.loading import load_model, not_computed_here

    terminal.hide_loading_bars()
    both = expert if other is None else expert + other
    with not_computed_here():  # the values are those of float32
        model = load_model(base)
    return singular_values(both.apply(model))


# --- output --------------------------------------------------------------------------------------


def _table(result: Profile | Comparison) -> Table:
    from pliant.experts.comparison import columns

    grid, layers = result.grid(), columns(result.matrices)
    head = ["layer", *grid]
    rows = [
        [
            "-" if layer is None else str(layer),
            *(_cell(cells[i], result) for cells in grid.values()),
        ]
        for i, layer in enumerate(layers)
    ]
    return Table(_title(result), head, rows, right=frozenset(head))


def _title(result: Profile | Comparison) -> str:
    what = "difference" if hasattr(result, "distance") else "change"
    return f"{what} relative to the weight" if result.relative else f"{what} of z, root mean square"


def _cell(value: float, result: Profile | Comparison) -> str:
    if value != value:
        return ""
    return f"{value:.2%}" if result.relative else f"{value:.3g}"


def _check_file(path: Path | None) -> None:
    """Refuse what cannot be written before the work begins."""
    if path is None:
        return
    if path.suffix not in (".html", ".svg"):
        raise InvalidInput(f"--heatmap {path}: name a .html or .svg file")
    if path.suffix == ".svg":
        from pliant import files

        files.check_writable(path)
        files.check_ours(path, *files.SVG)
    else:
        from pliant.reports import page

        page.check_writable(path)


def _write(path: Path, name: str, result: Profile | Comparison) -> None:
    from pliant.files import write_file
    from pliant.reports import page, plots

    drawing = plots.heat_maps(_maps(name, result), "projection", "change", "layer")
    if path.suffix == ".svg":
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, drawing.encode())
        return
    pictures: Sequence[tuple[str, str]] = [(drawing, f"{_title(result)}, by layer and projection.")]
    section = page.Section(name, [str(result)], [_table(result)], pictures)
    page.write(path, f"Expert: {name}", [section])


def _maps(name: str, result: Profile | Comparison) -> dict[str, Grid]:
    from pliant.experts.comparison import Comparison

    return result.grids() if isinstance(result, Comparison) else {name: result.grid()}
