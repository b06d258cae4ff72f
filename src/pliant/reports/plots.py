"""Pictures as SVG text in one style: one colour per series."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The page replaces it by its own text colour: see `page`.
INK = "#000000"
COLOURS = ("#98a2b3", "#2e6fdb", "#14804a", "#d97706", "#9333ea")
_MAIN, _FAINT = COLOURS[1], (COLOURS[0], *COLOURS[2:])
_DASHES: Any = ("--", ":", "-.", (0, (6, 1)), (0, (1, 1)))
_SIZE, _WIDE, _LOW = (5.6, 3.4), (9.0, 4.6), (9.0, 3.0)  # inches: two in a row, or one alone


@dataclass(frozen=True)
class Line:
    """A line through points, with a band if it has limits."""

    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    faint: bool = False
    """Whether it is only there for comparison."""


def bars(groups: Sequence[str], series: Mapping[str, Sequence[float]], x: str, y: str) -> str:
    """Grouped bars of shares: one group per name on the axis, one bar per series in it."""
    width = 0.8 / len(series)
    with _drawing(x, y) as (axes, out):
        for i, (name, values) in enumerate(series.items()):
            places = [g + (i - (len(series) - 1) / 2) * width for g in range(len(groups))]
            axes.bar(places, values, width * 0.92, label=name, color=COLOURS[i % len(COLOURS)])
        axes.set_xticks(range(len(groups)), groups)
        axes.set_ylim(0, 1)
        _legend(axes, len(series))
    return out.getvalue()


def intervals(values: Mapping[str, tuple[float, float, float]], x: str) -> str:
    """A point with its interval for each name, the first on top; each is (value, low, high)."""
    size = (_WIDE[0], 0.9 + 0.36 * len(values))
    with _drawing(x, "", size) as (axes, out):
        for place, (value, low, high) in enumerate(values.values()):
            colour = COLOURS[0] if place == 0 else _MAIN
            axes.plot([low, high], [place, place], color=colour, linewidth=2.4)
            axes.plot([value], [place], "o", color=colour, markersize=7)
            axes.annotate(
                f"{value:.3g}", (value, place), (0, 7), textcoords="offset points", ha="center"
            )
        axes.set_yticks(range(len(values)), list(values))
        axes.set_ylim(len(values) - 0.4, -0.7)
        axes.margins(x=0.06)
        axes.grid(axis="x", alpha=0.15, color=INK)
    return out.getvalue()


def signed_bars(values: Mapping[str, float], x: str) -> str:
    """A horizontal bar for each name, to the right or to the left of 0; the first on top."""
    with _drawing(x, "", (_WIDE[0], 0.9 + 0.36 * len(values))) as (axes, out):
        colours = [_MAIN if value >= 0 else COLOURS[3] for value in values.values()]
        drawn = axes.barh(range(len(values)), list(values.values()), 0.6, color=colours)
        axes.bar_label(drawn, fmt="{:.3g}", padding=4)
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_yticks(range(len(values)), list(values))
        axes.invert_yaxis()
        axes.margins(x=0.12)
    return out.getvalue()


def curve(
    points: Mapping[str, Sequence[tuple[float, float]]],
    marks: Mapping[str, tuple[float, float]],
    x: str,
    y: str,
) -> str:
    """Lines through points, and single named points."""
    highest = max((height for _, height in marks.values()), default=0.0)
    with _drawing(x, y) as (axes, out):
        for i, (name, line) in enumerate(points.items()):
            xs, ys = zip(*line, strict=True)
            axes.plot(xs, ys, label=name, color=COLOURS[i % len(COLOURS)], linewidth=2)
        for name, (at, height) in marks.items():
            axes.plot([at], [height], "o", color=INK, markersize=5)
            rise = 6 if height == highest else -13  # clear of the lines
            axes.annotate(name, (at, height), (6, rise), textcoords="offset points", fontsize=9)
        axes.margins(0.12)  # for the labels of the outermost
        axes.locator_params(nbins=6)
        _legend(axes, len(points))
    return out.getvalue()


def lines(
    drawn: Mapping[str, Line],
    x: str,
    y: str,
    ends: Mapping[str, tuple[float, float]] | None = None,
    point: tuple[str, tuple[float, float]] | None = None,
) -> str:
    """Many lines in one wide picture: the main ones with bands, and faint ones for comparison.

    `ends` are labelled where they are; the label of `point` is in the lower right corner, which is
    free where lines rise from left to right.
    """
    from matplotlib.ticker import MaxNLocator

    main = [name for name, line in drawn.items() if not line.faint]
    faint = [name for name, line in drawn.items() if line.faint]
    with _drawing(x, y, _WIDE) as (axes, out):
        for name, line in drawn.items():
            if not line.faint:
                colour = COLOURS[(main.index(name) + 1) % len(COLOURS)]
                if line.low is not None and line.high is not None:
                    axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.18, lw=0)
                axes.plot(line.x, line.y, label=name, color=colour, linewidth=2.4, zorder=3)
                continue
            # Colours and dashes repeat with different periods, so no two lines look alike.
            i = faint.index(name)
            colour, dashes = _FAINT[i % len(_FAINT)], _DASHES[i % len(_DASHES)]
            axes.plot(line.x, line.y, ls=dashes, label=name, color=colour, linewidth=1.4)
        for name, at in (ends or {}).items():
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


def reliability(bins: Sequence[tuple[float, float, float]], x: str, y: str) -> str:
    """Predicted against observed shares; each bin is (prediction, share, count).

    The area of the bars at the bottom shows how many predictions each bin has.
    """
    predicted, observed, counts = zip(*bins, strict=True)
    constant = sum(share * count for _, share, count in bins) / (sum(counts) or 1.0)
    grey: Any = {"color": COLOURS[0], "alpha": 0.35}
    with _drawing(x, y) as (axes, out):
        lefts, widths, heights = zip(*_bars_at_the_bottom(bins), strict=True)
        axes.bar(lefts, heights, widths, align="edge", label="predictions", **grey)
        axes.plot([0, 1], [0, 1], color=COLOURS[0], linewidth=1.2, label="perfect")
        marks: Any = {"zorder": 3, "clip_on": False}  # uncut at the edges
        axes.plot([constant], [constant], "s", color=COLOURS[3], ms=7, label="constant", **marks)
        axes.plot(predicted, observed, "o-", color=_MAIN, lw=1.6, ms=5, label="router", **marks)
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        _legend(axes, 4)
    return out.getvalue()


def histograms(
    edges: Sequence[float], counts: Mapping[str, Sequence[float]], x: str, y: str
) -> str:
    """Transparent counts in the same bins, drawn over each other."""
    colours = (COLOURS[2], COLOURS[3], COLOURS[4])
    with _drawing(x, y, _LOW) as (axes, out):
        for i, (name, heights) in enumerate(counts.items()):
            axes.stairs(heights, edges, fill=True, color=colours[i], alpha=0.3)
            axes.stairs(heights, edges, color=colours[i], linewidth=1.6, label=name)
        axes.set_xlim(edges[0], edges[-1])
        _legend(axes, len(counts))
    return out.getvalue()


def heat_maps(
    maps: Mapping[str, Mapping[str, Sequence[float]]], y: str, value: str, x: str = "unit"
) -> str:
    """One heat map under the other: a row for each name, a cell for each of its values.

    Rows of 128 values or more are sorted, the highest first. The colours are logarithmic
    if the values are positive and far apart, and span all but the outermost percent of them. A
    value that is NaN has no colour.
    """
    rows = sum(min(len(drawn), 40) for drawn in maps.values())
    size = (_WIDE[0], 1.1 * len(maps) + 0.16 * rows + 0.6)
    with _figure(size) as (figure, out):
        for i, (title, drawn) in enumerate(maps.items()):
            axes = figure.add_subplot(len(maps), 1, i + 1)
            _heat_map(axes, title, drawn, value, x)
            axes.set_ylabel(y)
    return out.getvalue()


def _heat_map(
    axes: Axes, title: str, drawn: Mapping[str, Sequence[float]], value: str, x: str
) -> None:
    from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize

    longest = max(map(len, drawn.values()))
    is_sorted = longest >= 128
    rows = [sorted(row, reverse=True) if is_sorted else list(row) for row in drawn.values()]
    ranked = sorted(cell for row in rows for cell in row if cell == cell)
    low, high = ranked[len(ranked) // 100], ranked[-1 - len(ranked) // 100]
    norm: Any = Normalize(low, high, clip=True)
    if low > 0 and high > 10 * low:
        norm = LogNorm(low, high, clip=True)
    floor = low if isinstance(norm, LogNorm) else ranked[0]  # a logarithm needs positive values
    padded = [
        [*(max(cell, floor) for cell in row), *[float("nan")] * (longest - len(row))]
        for row in rows
    ]
    colours = LinearSegmentedColormap.from_list("importance", ["#f2f4f7", COLOURS[1], "#101828"])
    image = axes.imshow(padded, aspect="auto", cmap=colours, norm=norm, interpolation="nearest")
    # No powers of ten in formulas, which `_figure` turns off.
    bar = axes.figure.colorbar(image, ax=axes, label=value, pad=0.01, format="{x:g}")
    assert bar.solids is not None
    bar.solids.set_rasterized(True)
    axes.set_title(title, loc="left", fontsize=10)
    every = -(-len(rows) // 16)
    axes.set_yticks(range(0, len(rows), every), list(drawn)[::every])
    axes.tick_params(labelsize=8)
    if longest == 1:
        axes.set_xticks([])
        return
    axes.set_xlabel(f"{x}, the highest of each row first" if is_sorted else x, fontsize=9)
    axes.locator_params(axis="x", integer=True)


def _bars_at_the_bottom(
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
    # A minimum width: the bar of a narrower bin would be so high that it dwarfs the rest.
    widths = [max(right - left, 0.02) for left, right in zip(lefts, rights, strict=True)]
    heights = [together[p] / width for p, width in zip(at, widths, strict=True)]
    scale = 0.25 / max(*heights, 1e-12)
    return [(x, w, h * scale) for x, w, h in zip(lefts, widths, heights, strict=True)]


def _legend(axes: Axes, columns: int) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=columns, frameon=False, fontsize=9)


@contextmanager
def _drawing(x: str, y: str, size: tuple[float, float] = _SIZE) -> Iterator[tuple[Axes, StringIO]]:
    """Axes, and a text that holds the picture when the block ends."""
    with _figure(size) as (figure, out):
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        yield axes, out


@contextmanager
def _figure(size: tuple[float, float]) -> Iterator[tuple[Figure, StringIO]]:
    """A figure, and a text that holds it when the block ends. No pyplot: no global state."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    out = StringIO()
    # A fixed salt, so that the same picture is the same text; text as text, smaller and searchable;
    # and no formulas, so that a dollar sign in a name is one.
    plain: Any = {"svg.hashsalt": "pliant", "svg.fonttype": "none", "text.parse_math": False}
    with rc_context({**plain, "font.family": "sans-serif"}):
        figure = Figure(figsize=size, layout="constrained")
        yield figure, out
        figure.savefig(out, format="svg", metadata={"Date": None}, transparent=True)
