"""Pictures as SVG text, drawn alike: one colour a series, values written where they help."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import StringIO
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# What is drawn in it takes the page's own colour of ink: see `page`.
INK = "#000000"
COLOURS = ("#98a2b3", "#2e6fdb", "#14804a", "#d97706", "#9333ea")


def bars(
    groups: Sequence[str], series: Mapping[str, Sequence[float]], x: str, y: str, top: float = 1.0
) -> str:
    """Bars side by side: one group a name on the axis, one bar in it for each series."""
    width = 0.8 / len(series)
    with _drawing(x, y) as (axes, out):
        for i, (name, values) in enumerate(series.items()):
            places = [g + (i - (len(series) - 1) / 2) * width for g in range(len(groups))]
            axes.bar(places, values, width * 0.92, label=name, color=COLOURS[i % len(COLOURS)])
        axes.set_xticks(range(len(groups)), groups)
        axes.set_ylim(0, top)
        _legend(axes, len(series))
    return out.getvalue()


def curve(
    points: Mapping[str, Sequence[tuple[float, float]]],
    marks: Mapping[str, tuple[float, float]],
    x: str,
    y: str,
) -> str:
    """Lines through points, and single points with their names."""
    highest = max((height for _, height in marks.values()), default=0.0)
    with _drawing(x, y) as (axes, out):
        for i, (name, line) in enumerate(points.items()):
            xs, ys = zip(*line, strict=True)
            axes.plot(xs, ys, label=name, color=COLOURS[i % len(COLOURS)], linewidth=2)
        for name, (at, height) in marks.items():
            axes.plot([at], [height], "o", color=INK, markersize=5)
            rise = 6 if height == highest else -13  # clear of the lines
            axes.annotate(name, (at, height), (6, rise), textcoords="offset points", fontsize=9)
        axes.margins(0.12)  # room for the names of the outermost
        axes.locator_params(nbins=6)
        _legend(axes, len(points))
    return out.getvalue()


def _legend(axes: Axes, columns: int) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=columns, frameon=False, fontsize=9)


@contextmanager
def _drawing(x: str, y: str) -> Iterator[tuple[Axes, StringIO]]:
    """Axes to draw on; when the block ends, the picture stands in the text beside them.

    Made without pyplot: no global state, no window system.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    out = StringIO()
    # A fixed salt: the same picture is the same text. Text stays text: smaller, and searchable.
    with rc_context(
        {"svg.hashsalt": "pliant", "svg.fonttype": "none", "font.family": "sans-serif"}
    ):
        figure = Figure(figsize=(5.6, 3.4), layout="constrained")
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        yield axes, out
        figure.savefig(out, format="svg", metadata={"Date": None}, transparent=True)
