"""Pictures as SVG text, drawn alike: one colour a series, values written where they help."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# What is drawn in it takes the page's own colour of ink: see `page`.
INK = "#000000"
COLOURS = ("#98a2b3", "#2e6fdb", "#14804a", "#d97706", "#9333ea")
_MAIN, _FAINT = COLOURS[1], (COLOURS[0], *COLOURS[2:])
_DASHES: Any = ("--", ":", "-.", (0, (6, 1)), (0, (1, 1)))
_SIZE, _WIDE, _LOW = (5.6, 3.4), (9.0, 4.6), (9.0, 3.0)  # inches: two in a row, or one alone


@dataclass(frozen=True)
class Line:
    """A line through points; with limits, in a band."""

    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    faint: bool = False
    """What is there to be compared with."""


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


def lines(
    drawn: Mapping[str, Line],
    ends: Mapping[str, tuple[float, float]],
    point: tuple[str, tuple[float, float]] | None,
    x: str,
    y: str,
) -> str:
    """Many lines in one wide picture: the main ones in their bands, the faint ones to compare.

    `ends` are named where they are; the `point` in the corner under all lines, which is free
    wherever lines rise from the left to the right.
    """
    from matplotlib.ticker import MaxNLocator

    faint = [name for name, line in drawn.items() if line.faint]
    with _drawing(x, y, _WIDE) as (axes, out):
        for name, line in drawn.items():
            if name not in faint:
                if line.low is not None and line.high is not None:
                    axes.fill_between(line.x, line.low, line.high, color=_MAIN, alpha=0.18, lw=0)
                axes.plot(line.x, line.y, label=name, color=_MAIN, linewidth=2.4, zorder=3)
                continue
            # No two alike: colours and dashes come round at different times.
            i = faint.index(name)
            colour, dashes = _FAINT[i % len(_FAINT)], _DASHES[i % len(_DASHES)]
            axes.plot(line.x, line.y, ls=dashes, label=name, color=colour, linewidth=1.4)
        for name, at in ends.items():
            axes.plot(*at, "o", color=INK, markersize=6, zorder=4)
            axes.annotate(name, at, (10, -14), textcoords="offset points", fontsize=10)
        if point is not None:
            name, at = point
            axes.plot(*at, "o", color=INK, markersize=7, zorder=4)
            corner: Any = {"textcoords": "axes fraction", "ha": "right", "fontsize": 10}
            arrow: Any = {"arrowstyle": "-", "color": INK, "lw": 0.8, "shrinkB": 5}
            axes.annotate(name, at, (0.97, 0.06), arrowprops=arrow, **corner)
        axes.margins(0.06)
        if all(isinstance(at, int) for line in drawn.values() for at in line.x):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.15, color=INK)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=10)
    return out.getvalue()


def bands(drawn: Mapping[str, Line], x: str, y: str) -> str:
    """Lines of equal rank, each in a colour and a band of its own; the faint ones are dashed."""
    with _drawing(x, y, _WIDE) as (axes, out):
        for i, (name, line) in enumerate(drawn.items()):
            colour = COLOURS[(i + 1) % len(COLOURS)]
            if line.low is not None and line.high is not None:
                axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.15, lw=0)
            dashes = "--" if line.faint else "-"
            axes.plot(line.x, line.y, label=name, color=colour, ls=dashes, linewidth=2)
        axes.margins(x=0.02)
        axes.grid(alpha=0.15, color=INK)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=10)
    return out.getvalue()


def reliability(bins: Sequence[tuple[float, float, float]], x: str, y: str) -> str:
    """What was predicted against what was so, (prediction, share, count) a bin.

    Bars at the foot show where the predictions lie: the area of each is the count of its bin.
    """
    said = [p for p, _, _ in bins]
    found = [share for _, share, _ in bins]
    total = sum(count for _, _, count in bins) or 1.0
    constant = sum(share * count for _, share, count in bins) / total
    with _drawing(x, y) as (axes, out):
        places = _bars_at_the_foot(bins)
        axes.bar(
            [left for left, _, _ in places],
            [height for _, _, height in places],
            [width for _, width, _ in places],
            align="edge",
            color=COLOURS[0],
            alpha=0.35,
            label="predictions",
        )
        axes.plot([0, 1], [0, 1], color=COLOURS[0], linewidth=1.2, label="perfect")
        marks: Any = {"zorder": 3, "clip_on": False}  # whole, where they lie on the edge
        axes.plot([constant], [constant], "s", color=COLOURS[3], ms=7, label="constant", **marks)
        axes.plot(said, found, "o-", color=_MAIN, lw=1.6, ms=5, label="router", **marks)
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        _legend(axes, 4)
    return out.getvalue()


def histograms(
    edges: Sequence[float], counts: Mapping[str, Sequence[float]], x: str, y: str
) -> str:
    """Counts in the same bins, one over the other and both to be seen through."""
    colours = (COLOURS[2], COLOURS[3], COLOURS[4])
    with _drawing(x, y, _LOW) as (axes, out):
        for i, (name, heights) in enumerate(counts.items()):
            axes.stairs(heights, edges, fill=True, color=colours[i], alpha=0.3)
            axes.stairs(heights, edges, color=colours[i], linewidth=1.6, label=name)
        axes.set_xlim(edges[0], edges[-1])
        _legend(axes, len(counts))
    return out.getvalue()


def _bars_at_the_foot(
    bins: Sequence[tuple[float, float, float]],
) -> list[tuple[float, float, float]]:
    """(left, width, height): each bin reaches half-way to its neighbours."""
    together: dict[float, float] = {}
    for prediction, _, count in bins:
        together[prediction] = together.get(prediction, 0.0) + count
    at = sorted(together)
    middles = [(a + b) / 2 for a, b in zip(at, at[1:], strict=False)]
    lefts = [max(0.0, at[0] - 0.05), *middles]
    rights = [*middles, min(1.0, at[-1] + 0.05)]
    # Bins that lie closer than this are drawn as if they did not, or they would dwarf the rest.
    widths = [max(right - left, 0.02) for left, right in zip(lefts, rights, strict=True)]
    heights = [together[p] / width for p, width in zip(at, widths, strict=True)]
    scale = 0.25 / max(*heights, 1e-12)
    return [(x, w, h * scale) for x, w, h in zip(lefts, widths, heights, strict=True)]


def _legend(axes: Axes, columns: int) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=columns, frameon=False, fontsize=9)


@contextmanager
def _drawing(x: str, y: str, size: tuple[float, float] = _SIZE) -> Iterator[tuple[Axes, StringIO]]:
    """Axes to draw on; when the block ends, the picture stands in the text beside them.

    Made without pyplot: no global state, no window system.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    out = StringIO()
    # A fixed salt: the same picture is the same text. Text stays text: smaller, and searchable.
    # And a dollar sign stays one: names and goals are no formulas.
    plain: Any = {"svg.hashsalt": "pliant", "svg.fonttype": "none", "text.parse_math": False}
    with rc_context({**plain, "font.family": "sans-serif"}):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        yield axes, out
        figure.savefig(out, format="svg", metadata={"Date": None}, transparent=True)
