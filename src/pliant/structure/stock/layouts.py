"""The axes of a model's tensors that hold units, and how the units lie in them.

A smaller model of the same class shows by its shapes which axes have shrunk. An axis may be laid
out in several ways: query, key and value in one matrix, one after the other or head by head.
"""

from __future__ import annotations

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
    """The key without the layer, the axis, its size and units: laid out alike in such layers."""
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
                name = f"{key.removeprefix(paths[site.layer])} {axis} {a} {units_of(site)}"
                heads = site.count if site.kind == "heads" else 0
                layouts = _layouts(units_of(site), heads, site.width, a, b, counts[site.key])
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


def _segments(sizes: list[int], units: int, tail: int = 0) -> Layout:
    """Segments one after the other, each with the units in order; then a `tail` that stays."""

    def indices(remaining: Tensor) -> Tensor:
        parts, start = [], 0
        for size in sizes:
            each = size // units
            parts.append((remaining[:, None] * each + torch.arange(each)).flatten() + start)
            start += size
        parts.append(torch.arange(start, start + tail))
        return torch.cat(parts)

    return indices
