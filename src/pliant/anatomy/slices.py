"""Units that are slices of one parameter: channels of stacked experts, heads without a projection.

What such a unit makes is computed inside a module's forward, where no hook could scale it; so its
slice of the parameter is scaled instead. Letters: E experts of F channels, D features.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pliant.anatomy.blocks import (
    DOWN_NAMES,
    HEAD_COUNTS,
    HEAD_WIDTHS,
    Absent,
    numbers,
    projections,
)


@dataclass(frozen=True)
class Slices:
    """Unit n is slice n of the parameter, counted along `axes` of its view."""

    caller: nn.Module
    """The module that reads the parameter in its forward."""
    holder: nn.Module
    """The module that has it: nearly always the same."""
    parameter: str
    path: str
    """The parameter's path in the layer."""
    view: tuple[int, ...]
    axes: tuple[int, ...]

    @property
    def count(self) -> int:
        return math.prod(self.view[axis] for axis in self.axes)

    def scaled(self, parameter: Tensor, scale: Tensor) -> Tensor:
        """The parameter with each unit's slice times its number in `scale`, (units,)."""
        shape = [size if axis in self.axes else 1 for axis, size in enumerate(self.view)]
        return (parameter.view(self.view) * scale.view(shape)).view_as(parameter)

    def squares(self, parameter: Tensor) -> Tensor:
        """(units,) the squared norm of each slice."""
        rest = tuple(axis for axis in range(len(self.view)) if axis not in self.axes)
        return parameter.detach().double().view(self.view).square().sum(dim=rest).flatten()


# --- channels of experts -------------------------------------------------------------------------


def find_expert_channels(layer: nn.Module, hidden_size: int) -> tuple[Slices, ...] | Absent:
    """The channels of the layer's experts, whose down projections are stacked in one parameter."""
    channels = [
        slices
        for path, module in layer.named_modules()
        for slices in (
            *_stacked(path, module, hidden_size),
            *_siblings(path, module, hidden_size),
            *_joined(layer, path, module, hidden_size),
        )
        if not _ATTENTION.search(path)
    ]
    return tuple(channels) or Absent("it has no mixture of experts with stacked weights")


_ATTENTION = re.compile(r"att[^.]*(\.|$)", re.IGNORECASE)


def _stacked(path: str, module: nn.Module, hidden_size: int) -> Iterator[Slices]:
    """Both projections are parameters of one module, (E, D, F) or transposed."""
    own = {n: p for n, p in module.named_parameters(recurse=False) if p.dim() == 3}
    down = next((own.pop(name) for name in DOWN_NAMES if name in own), None)
    if down is None or "expert" not in f"{path}{type(module).__name__}".lower():
        return
    axis = _channel_axis(down, list(own.values()), hidden_size, module)
    if axis is not None:
        name = next(n for n, p in module.named_parameters(recurse=False) if p is down)
        yield Slices(module, module, name, f"{path}.{name}", tuple(down.shape), (0, axis))


def _siblings(path: str, parent: nn.Module, hidden_size: int) -> Iterator[Slices]:
    """Each projection is a module with one stacked weight (JetMoE)."""
    stacked = _stacked_children(parent)
    for name, child in stacked.items():
        others = [c.weight for n, c in stacked.items() if n != name]
        if name in DOWN_NAMES and _channel_axis(child.weight, others, hidden_size, child) == 2:
            whole = f"{path}.{name}.weight"
            yield Slices(child, child, "weight", whole, tuple(child.weight.shape), (0, 2))


def _stacked_children(parent: nn.Module) -> dict[str, Any]:
    weights = {name: getattr(child, "weight", None) for name, child in parent.named_children()}
    return {
        name: parent.get_submodule(name)
        for name, weight in weights.items()
        if isinstance(weight, nn.Parameter) and weight.dim() == 3
    }


def _joined(layer: nn.Module, path: str, module: nn.Module, hidden_size: int) -> Iterator[Slices]:
    """The experts' matrices are joined along their channels, (E F, D), for the parent to split."""
    parent = layer.get_submodule(path.rpartition(".")[0])
    experts = getattr(parent, "num_experts", None)
    own = {n: p for n, p in module.named_parameters(recurse=False) if p.dim() == 2}
    down = own.get("w2")
    if down is None or not isinstance(experts, int) or len(own) < 2:
        return
    if down.shape[1] == hidden_size and down.shape[0] % experts == 0:
        view = (experts, down.shape[0] // experts, hidden_size)
        yield Slices(parent, module, "w2", f"{path}.w2", view, (0, 1))


def _channel_axis(down: Tensor, ups: list[Any], hidden_size: int, module: nn.Module) -> int | None:
    """The axis of `down` that another projection widens to, once or with a gate."""
    fitting = [
        axis
        for axis in (2, 1)
        if down.shape[3 - axis] == hidden_size
        and any(
            up.shape[axis] == hidden_size
            and up.shape[3 - axis] in (down.shape[axis], 2 * down.shape[axis])
            for up in ups
        )
    ]
    if len(fitting) == 2:  # square, and without a gate
        return 1 if getattr(module, "is_transposed", False) else 2
    return fitting[0] if fitting else None


# --- heads ---------------------------------------------------------------------------------------


def find_sliced_heads(
    layer: nn.Module, hidden_size: int, config: Any
) -> tuple[Slices, ...] | Absent:
    """The heads of attention that ends in no projection of all heads.

    Those of a mixture of attention (JetMoE) are each expert's own; XLNet's output is a bare
    parameter; DeepSeek-V4 projects groups of heads apart.
    """
    heads = [
        slices
        for path, module in layer.named_modules()
        for slices in (
            *_bare_heads(path, module, hidden_size),
            *_heads_of_experts(layer, path, module, hidden_size, config),
            *_heads_in_groups(path, module, config),
        )
    ]
    return tuple(heads) or Absent("its heads are no slices of a parameter")


def _bare_heads(path: str, module: nn.Module, hidden_size: int) -> Iterator[Slices]:
    own = dict(module.named_parameters(recurse=False))
    shapes = {tuple(own[name].shape) if name in own else () for name in "qkvo"}
    if len(shapes) == 1 and len(shape := shapes.pop()) == 3 and shape[0] == hidden_size:
        yield Slices(module, module, "o", f"{path}.o", shape, (1,))


def _heads_of_experts(
    layer: nn.Module, path: str, parent: nn.Module, hidden_size: int, config: Any
) -> Iterator[Slices]:
    if not re.search(r"att.*expert", path):
        return
    attention = layer.get_submodule(path.rpartition(".")[0])
    for name, child in _stacked_children(parent).items():
        weight: Tensor = child.weight
        if "output" not in name or weight.shape[1] != hidden_size:
            continue
        widths = numbers(HEAD_WIDTHS, attention, [config])
        width = next((w for w in widths if weight.shape[2] % w == 0), None)
        if width is not None:
            view = (*weight.shape[:2], weight.shape[2] // width, width)
            yield Slices(child, child, "weight", f"{path}.{name}.weight", view, (0, 2))


def _heads_in_groups(path: str, block: nn.Module, config: Any) -> Iterator[Slices]:
    heads = numbers(HEAD_COUNTS, block, [])
    widths = numbers(HEAD_WIDTHS, block, [config])
    for projection in projections(block, path):
        groups = getattr(projection.module, "n_groups", None)
        weight = projection.module._parameters.get("weight")  # a LoRA layer has none of its own
        direct = projection.path.rpartition(".")[0] == path
        if not (direct and isinstance(groups, int) and isinstance(weight, nn.Parameter)):
            continue
        for count in heads:
            for width in widths:
                if count * width == projection.inputs * groups and count % groups == 0:
                    view = (groups, projection.outputs // groups, count // groups, width)
                    module = projection.module
                    whole = f"{projection.path}.weight"
                    yield Slices(module, module, "weight", whole, view, (0, 2))
                    return
