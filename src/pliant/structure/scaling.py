"""The hooks that scale units: at the input of a projection, or in the parameter that has them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn

from pliant.adapters import Before, Wire, Within
from pliant.anatomy.slices import Slices
from pliant.errors import UnsupportedModel
from pliant.structure.units import Site

Gate = Callable[[Tensor], Tensor]
"""(units,), or (rows, units), for a tensor that is scaled."""


def scaling(site: Site, gate: Gate) -> Iterator[Wire]:
    """The hooks that scale a site's units by `gate(like)`, wherever they are read."""
    if site.slices is not None:
        slices = site.slices
        scale = partial(scale_slices, gate, slices)
        yield Within(slices.caller, slices.holder, slices.parameter, scale)
        return
    yield Before(site.module, partial(scale_input, gate, site.width))


def scale_slices(gate: Gate, slices: Slices, parameter: Tensor) -> Tensor:
    """A parameter with each unit's slice times its gate."""
    if not parameter.is_floating_point() or parameter.numel() != math.prod(slices.view):
        raise UnsupportedModel(
            f"{slices.path} is packed or sharded ({parameter.dtype}, {tuple(parameter.shape)}), so "
            "its slices cannot be scaled: load the model in 16 or 32 bits, or gate other units"
        )
    return slices.scaled(parameter, gate(parameter))


def scale_input(
    gate: Gate,
    width: int,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A hook before a projection: each unit's features, `width` of them, times `gate(input)`."""
    name = None if args else next(iter(kwargs))
    x = args[0] if name is None else kwargs[name]
    scale = gate(x)
    if width > 1:
        scale = scale.repeat_interleave(width, dim=-1)
    scaled = x * beside(scale, x)
    return ((scaled, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: scaled})


def beside(scale: Tensor, x: Tensor) -> Tensor:
    """(units,) as it is; (rows, units) with the tokens' axis of `x` in between."""
    return scale if scale.dim() == 1 or x.dim() == 2 else scale[:, None]
