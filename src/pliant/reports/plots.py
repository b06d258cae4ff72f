"""Pictures as SVG text in one style and one width. A series' colour is its role: see `palette`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from itertools import count
from typing import TYPE_CHECKING, Any

from pliant.reports.palette import INK, Role, colour

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH, _HEIGHT, _LOW = 8.0, 3.8, 2.8  # inches: all pictures of a page are as wide as each other
_DASHES: Any = ("--", ":", "-.", (0, (6, 1)), (0, (1, 1)))
_WIDTHS = (1.4, 2.6)

Roles = Mapping[str, Role]
"""What is not named in one is a control."""


@dataclass(frozen=True)
class Line:
    """A line through points, with a band if it has limits."""

    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    role: Role = "ours"

    @classmethod
    def through(cls, points: Iterable[tuple[float, float]], role: Role = "ours") -> Line:
        x, y = zip(*points, strict=True)
        return cls(x, y, role=role)

    @property
    def is_main(self) -> bool:
        return self.role == "ours"


def bars(
    groups: Sequence[str], series: Mapping[str, Sequence[float]], roles: Roles, x: str, y: str
) -> str:
    """Grouped bars of shares: one group per name on the axis, one bar per series in it."""
    width = 0.8 / len(series)
    with _drawing(x, y) as (axes, out):
        for i, (name, values) in enumerate(series.items()):
            places = [g + (i - (len(series) - 1) / 2) * width for g in range(len(groups))]
            shade = colour(roles.get(name, "control"))
            axes.bar(places, values, width * 0.92, label=name, color=shade)
        axes.set_xticks(range(len(groups)), groups)
        axes.set_ylim(0, 1)
        _legend(axes, len(series))
    return out.getvalue()


def intervals(values: Mapping[str, tuple[float, float, float]], roles: Roles, x: str) -> str:
    """A point with its interval for each name, the first on top; each is (value, low, high)."""
    with _drawing(x, "", 0.9 + 0.36 * len(values)) as (axes, out):
        for place, (name, (value, low, high)) in enumerate(values.items()):
            shade = colour(roles.get(name, "control"))
            axes.plot([low, high], [place, place], color=shade, linewidth=2.4)
            axes.plot([value], [place], "o", color=shade, markersize=7)
            axes.annotate(
                f"{value:.3g}", (value, place), (0, 7), textcoords="offset points", ha="center"
            )
        axes.set_yticks(range(len(values)), list(values))
        axes.set_ylim(len(values) - 0.4, -0.7)
        axes.margins(x=0.06)
        _from_zero(axes, "x")
        axes.grid(axis="x", alpha=0.15, color=INK)
    return out.getvalue()


def signed_bars(values: Mapping[str, float], x: str) -> str:
    """A horizontal bar for each name, to the right or to the left of 0; the first on top."""
    with _drawing(x, "", 0.9 + 0.36 * len(values)) as (axes, out):
        drawn = axes.barh(range(len(values)), list(values.values()), 0.6, color=colour("ours"))
        axes.bar_label(drawn, fmt="{:.3g}", padding=4)
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_yticks(range(len(values)), list(values))
        axes.invert_yaxis()
        axes.margins(x=0.12)
    return out.getvalue()


def lines(
    drawn: Mapping[str, Line],
    x: str,
    y: str,
    ends: Mapping[str, tuple[float, float]] | None = None,
    point: tuple[str, tuple[float, float]] | None = None,
) -> str:
    """Lines in the colours of their roles, ours in front and with bands.

    An axis begins at 0 where none of its values is below; one of whole numbers, such as steps,
    begins at the first.

    `ends` are labelled where they are; the label of `point` is in the lower right corner, which is
    free where lines rise from left to right.
    """
    from matplotlib.ticker import MaxNLocator

    with _drawing(x, y) as (axes, out):
        for (name, line), style in zip(drawn.items(), _styles(drawn.values()), strict=True):
            if line.low is not None and line.high is not None:
                axes.fill_between(
                    line.x, line.low, line.high, color=style["color"], alpha=0.18, lw=0
                )
            axes.plot(line.x, line.y, label=name, zorder=3 if line.is_main else 2, **style)
        for name, at in (ends or {}).items():
            axes.plot(*at, "o", color=INK, markersize=6, zorder=4)
            axes.annotate(name, at, (8, -14), textcoords="offset points", fontsize=10)
        if point is not None:
            name, at = point
            axes.plot(*at, "o", color=colour("ours"), markersize=8, zorder=4)
            corner: Any = {"textcoords": "axes fraction", "ha": "right", "fontsize": 10}
            arrow: Any = {"arrowstyle": "-", "color": INK, "lw": 0.8, "shrinkB": 5}
            axes.annotate(name, at, (0.97, 0.06), arrowprops=arrow, **corner)
        axes.margins(0.06)
        _from_zero(axes, "y")
        if all(isinstance(at, int) for line in drawn.values() for at in line.x):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        else:
            _from_zero(axes, "x")
        axes.grid(alpha=0.15, color=INK)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=10)
    return out.getvalue()


def _styles(drawn: Any) -> Iterator[dict[str, Any]]:
    """A line is solid if it is the first of its role, and not a control; the others are dashed.

    Dashes and widths repeat with different periods, so no two lines of a role look alike.
    """
    counted = {line.role: count(0 if line.role != "control" else 1) for line in drawn}
    for line in drawn:
        i = next(counted[line.role])
        if i == 0:
            yield {"color": colour(line.role), "lw": 2.4 if line.is_main else 1.8, "ls": "-"}
            continue
        dashes, width = _DASHES[(i - 1) % len(_DASHES)], _WIDTHS[(i - 1) // len(_DASHES) % 2]
        yield {"color": colour(line.role), "lw": width, "ls": dashes}


def _from_zero(axes: Axes, which: str) -> None:
    """Begin the axis at 0 if all that it shows lies above, so that no difference looks larger."""
    low, high = getattr(axes, f"get_{which}lim")()
    low, high = min(low, high), max(low, high)
    smallest = axes.dataLim.x0 if which == "x" else axes.dataLim.y0
    if smallest >= 0:
        getattr(axes, f"set_{which}lim")(0, high)


def reliability(bins: Sequence[tuple[float, float, float]], x: str, y: str) -> str:
    """Predicted against observed shares; each bin is (prediction, share, count).

    The bars below show how many predictions each bin has.
    """
    predicted, observed, counts = zip(*bins, strict=True)
    constant = sum(share * number for _, share, number in bins) / (sum(counts) or 1.0)
    with _figure(_HEIGHT + 1.2) as (figure, out):
        axes, below = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
        axes.plot([0, 1], [0, 1], color=colour("bound"), linewidth=1.2, label="perfect")
        marks: Any = {"zorder": 3, "clip_on": False}  # uncut at the edges
        grey = colour("control")
        axes.plot([constant], [constant], "s", color=grey, ms=7, label="constant", **marks)
        ours: Any = {"color": colour("ours"), "lw": 1.6, "ms": 5, "label": "router", **marks}
        axes.plot(predicted, observed, "o-", **ours)
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        axes.set_ylabel(y)
        _legend(axes, 3)
        together = _counts(bins)
        width = min([0.05, *(b - a for a, b in zip(sorted(together), sorted(together)[1:]))])  # noqa: B905
        drawn = below.bar(list(together), list(together.values()), max(width, 0.01), color=grey)
        below.bar_label(drawn, fmt="{:,.0f}", fontsize=8, padding=2)
        below.margins(y=0.35)
        below.set_xlabel(x)
        below.set_ylabel("prompts")
        for each in (axes, below):
            each.spines[["top", "right"]].set_visible(False)
    return out.getvalue()


def _counts(bins: Sequence[tuple[float, float, float]]) -> dict[float, float]:
    """The predictions of each bin; bins of one prediction together."""
    together: dict[float, float] = {}
    for prediction, _, number in bins:
        together[prediction] = together.get(prediction, 0.0) + number
    return together


def histograms(
    edges: Sequence[float], counts: Mapping[str, Sequence[float]], roles: Roles, x: str, y: str
) -> str:
    """Transparent counts in the same bins, drawn over each other."""
    with _drawing(x, y, _LOW) as (axes, out):
        for name, heights in counts.items():
            shade = colour(roles.get(name, "control"))
            axes.stairs(heights, edges, fill=True, color=shade, alpha=0.3)
            axes.stairs(heights, edges, color=shade, linewidth=1.6, label=name)
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
    with _figure(1.1 * len(maps) + 0.16 * rows + 0.6) as (figure, out):
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
    shades = LinearSegmentedColormap.from_list("importance", ["#f2f4f7", colour("ours"), "#101828"])
    image = axes.imshow(padded, aspect="auto", cmap=shades, norm=norm, interpolation="nearest")
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


def _legend(axes: Axes, columns: int) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=columns, frameon=False, fontsize=9)


@contextmanager
def _drawing(x: str, y: str, height: float = _HEIGHT) -> Iterator[tuple[Axes, StringIO]]:
    """Axes, and a text that holds the picture when the block ends."""
    with _figure(height) as (figure, out):
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        yield axes, out


@contextmanager
def _figure(height: float) -> Iterator[tuple[Figure, StringIO]]:
    """A figure, and a text that holds it when the block ends. No pyplot: no global state."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    out = StringIO()
    # A fixed salt, so that the same picture is the same text; text as text, smaller and searchable;
    # and no formulas, so that a dollar sign in a name is one.
    plain: Any = {"svg.hashsalt": "pliant", "svg.fonttype": "none", "text.parse_math": False}
    with rc_context({**plain, "font.family": "sans-serif"}):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        yield figure, out
        figure.savefig(out, format="svg", metadata={"Date": None}, transparent=True)
