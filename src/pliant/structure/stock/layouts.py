"""The axes of a model's tensors that hold units, and how the units lie in them.

A smaller model of the same class shows by its shapes which axes have shrunk. An axis may be laid
out in several ways: query, key and value in one matrix, one after the other or head by head.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from pliant.anatomy import Anatomy
from pliant.anatomy.find import path_of
from pliant.structure.units import Site, units_of

Shapes = Mapping[str, torch.Size]
Layout = Callable[[Tensor], Tensor]
"""From remaining units to remaining indices of an axis."""


@dataclass(frozen=True, eq=False)
class Axis:
    key: str
    name: str
    """The key without the layer, the axis, its size and units: laid out alike in such layers, and
    in the weight and the bias of a module."""
    axis: int
    site: Site
    layouts: tuple[Layout, ...] | None
    """None if no layout fits: it shrank by something else."""


def shrunk_axes(
    anatomy: Anatomy, before: Shapes, after: Shapes, sites: list[Site], counts: Mapping[str, int]
) -> Iterator[Axis]:
    by_layer = {site.layer: site for site in sites}
    paths = [f"{path_of(anatomy.model, layer)}." for layer in anatomy.layers]
    if before.keys() != after.keys():
        yield Axis("", "", 0, sites[0], None)
        return
    for key, shape in after.items():
        old = before[key]
        if old == shape:
            continue
        layer = next((i for i, path in enumerate(paths) if key.startswith(path)), None)
        site = None if layer is None else by_layer.get(layer)
        if site is None or len(old) != len(shape):
            yield Axis(key, key, 0, sites[0], None)
            continue
        for axis, (a, b) in enumerate(zip(old, shape, strict=True)):
            if a != b:
                tensor = re.sub(r"\.bias$", ".weight", key.removeprefix(paths[site.layer]))
                name = f"{tensor} {axis} {a} {units_of(site)}"
                heads = site.count if site.kind == "heads" else 0
                layouts = _layouts(units_of(site), heads, site.width, a, b, counts[site.key])
                if site.kind == "recurrent_heads":
                    layouts = _recurrent_layouts(site, a, b, counts[site.key])
                if site.kind == "experts" and a - b == site.count - counts[site.key]:
                    # LongCat's router also chooses among experts that compute nothing.
                    layouts = (_segments([site.count], site.count, tail=a - site.count),)
                yield Axis(key, name, axis, site, layouts or None)


@cache
def _layouts(
    units: int, heads: int, width: int, before: int, after: int, count: int
) -> tuple[Layout, ...]:
    """The ways in which an axis of `before` may hold the units and shrink to `after`.

    `heads` is their number in all, 0 if the units are no heads, and `width` that of one.
    """
    layouts: list[Layout] = []
    if before * count == after * units:
        each = before // units
        group = heads // units
        if heads and each == (group + 2) * width:  # queries, keys, values; or all three by group
            layouts.append(_segments([units * group * width, *[units * width] * 2], units))
        if not heads and each == 2:  # gate and up, or one of each in turn
            layouts.append(_segments([units, units], units))
        layouts.append(_segments([before], units))
    elif heads and before - after == (units - count) * width:  # all queries, then what they share
        layouts.append(_segments([units * width], units, tail=before - units * width))
    return tuple(layouts)


def _recurrent_layouts(site: Site, before: int, after: int, count: int) -> tuple[Layout, ...]:
    """The ways in which a projection or convolution of a recurrent mixer may hold its units.

    In all of them a unit is as wide as what the axis has lost says; the rest is shared by all units
    and stays.
    """
    units = units_of(site)
    each, odd = divmod(before - after, units - count)
    shared = before - units * each
    if odd or each < 1 or shared < 0:
        return ()
    heads = site.count // units
    value = heads * site.width
    ways: list[tuple[int, ...]] = [(each,)]  # all of a unit, then all of the next
    if (keys := each - value) > 0 and keys % 2 == 0:
        ways += [(value, keys // 2, keys // 2), (keys // 2, keys // 2, value)]
    if (keys := each - 2 * value - heads) >= 0 and keys % 2 == 0:
        # Mamba-2: gates, values, B and C, time steps; all heads may share B and C.
        ways.append((value, value, *[keys // 2] * (2 if keys else 0), heads))
    places = range(-1, 1) if shared else [0]
    return tuple(
        _segments([units * width for width in way], units, tail=shared, at=len(way) + place)
        for way in dict.fromkeys(ways)
        for place in places
    )


def _segments(sizes: list[int], units: int, tail: int = 0, at: int | None = None) -> Layout:
    """Segments one after the other, each with the units in order; and a `tail` that stays, at the
    end or before segment `at`."""

    def indices(remaining: Tensor) -> Tensor:
        parts, start = [], 0
        for number, size in enumerate([*sizes, 0]):
            if number == (len(sizes) if at is None else at):
                parts.append(torch.arange(start, start + tail))
                start += tail
            each = size // units
            parts.append((remaining[:, None] * each + torch.arange(each)).flatten() + start)
            start += size
        return torch.cat(parts)

    return indices
