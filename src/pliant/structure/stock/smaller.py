"""A stock model with fewer units of one kind: its config, and the slices of every tensor.

Nothing here knows an architecture. A model that is built of a smaller config (`configs`) shows by
its shapes which axes have shrunk (`layouts`). Where an axis may be laid out in several ways, each
way is a candidate, and the caller compares outputs.

A candidate's tensors are made when they are asked for, so the model may be one without weights at
hand: then its shapes make the plan, and `state` reads the tensors from elsewhere.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import islice, product
from typing import Any

import torch
from torch import Tensor, nn

from pliant.adapters.stock import assembled, skeleton
from pliant.anatomy import Anatomy
from pliant.anatomy.config import config_of_layers
from pliant.anatomy.find import path_of
from pliant.errors import UnsupportedModel
from pliant.structure.config import Kind
from pliant.structure.stock.configs import on_meta, smaller_forms, why_no_ratio
from pliant.structure.stock.layouts import Axis, Layout, Shapes, shrunk_axes
from pliant.structure.stock.lazy_state import LazyState, State
from pliant.structure.units import sites_of

MOST_LAYOUTS = 32


@dataclass(frozen=True)
class Choice:
    """Which of the candidates: the same description fits models that differ in depth alone."""

    form: type[nn.Module]
    change: Mapping[str, Any]
    """Numbers of the config and their new values."""
    layouts: Mapping[str, int]
    """For each axis, by its name, which of its possible layouts."""


@dataclass(frozen=True, eq=False)
class Stock:
    """A stock model that is not compared with its original yet."""

    config: Any
    kind: type[nn.Module]
    state: State = field(repr=False)
    choice: Choice | None = None

    def skeleton(self) -> Any:
        """The model without weights."""
        return skeleton(self.kind, self.config)

    def build(self) -> Any:
        """The model, in eval mode; its tensors are those of `state`, and none is allocated."""
        return assembled(self.kind, self.config, self.state)


def without_layers(model: Any, remaining: list[int], state: State | None = None) -> Stock:
    """The model with these layers alone; `state` has its tensors if it has none itself."""
    anatomy = Anatomy.of(model)
    depth = len(anatomy.layers)
    config = config_of_layers(model.config, depth, remaining)
    paths = [path_of(model, layer) for layer in anatomy.layers]
    stack = {str(p).rpartition(".")[0] for p in paths}
    if len(stack) != 1 or None in paths:
        raise UnsupportedModel(f"{type(model).__name__}: its layers are no single stack")
    new = {f"{paths[old]}.": f"{paths[i]}." for i, old in enumerate(remaining)}
    own = model.state_dict()
    names: dict[str, str] = {}
    for key in own:
        old = next((f"{path}." for path in paths if key.startswith(f"{path}.")), None)
        if old is None:
            names[key] = key
        elif old in new:
            names[new[old] + key.removeprefix(old)] = key
    source = own if state is None else state
    lazy = LazyState({name: partial(source.__getitem__, key) for name, key in names.items()})
    stock = Stock(config, type(model), lazy)
    _check_shapes(stock, {name: own[key].shape for name, key in names.items()})
    return stock


def has_stock_form_without(model: Any, layers: Collection[int]) -> bool:
    """Whether the other layers make a stock model; it has the shapes for it, at least."""
    depth = len(Anatomy.of(model).layers)
    try:
        without_layers(model, [index for index in range(depth) if index not in layers])
    except UnsupportedModel:
        return False
    return True


def with_fewer(
    model: Any,
    kind: Kind,
    remaining: Mapping[str, Tensor],
    *,
    state: State | None = None,
    choice: Choice | None = None,
) -> Iterator[Stock]:
    """Candidates for the model with these units alone, by a site's key.

    For heads the units are groups that share a KV head; where all heads share one, they are heads.
    `state` has the model's tensors if it has none itself. With a `choice` it is the only candidate.
    """
    anatomy = Anatomy.of(model)
    sites = sites_of(anatomy, [kind])
    counts = {site.key: len(remaining[site.key]) for site in sites}
    own = model.state_dict()
    before = {key: tensor.shape for key, tensor in own.items()}
    why, any_fits = "no number of its config is their count", False
    for form, config, change in smaller_forms(model, sites, counts):
        if choice is not None and (form, change) != (choice.form, choice.change):
            continue
        try:
            config.validate()
            after = {k: t.shape for k, t in on_meta(form, config).state_dict().items()}
        except Exception as error:  # whatever a config or a constructor may raise
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            continue
        axes = list(shrunk_axes(anatomy, before, after, sites, counts))
        if not axes or any(axis.layouts is None for axis in axes):
            continue
        for layouts in _layout_choices(axes, choice):
            cuts = _cuts(axes, layouts, remaining)
            changes = {key: partial(_cut, by_axis) for key, by_axis in cuts.items()}
            if all(_cut_shape(before[k], cuts.get(k, {})) == after[k] for k in after):
                any_fits = True
                lazy = LazyState.over(own if state is None else state, changes)
                yield Stock(config, form, lazy, Choice(form, change, layouts))
    if not any_fits:
        why = why_no_ratio(model, sites, counts) or why
        raise UnsupportedModel(
            f"{type(model).__name__} has no stock form with {next(iter(counts.values()))} {kind} "
            f"in every layer ({why})"
        )


def _layout_choices(axes: list[Axis], choice: Choice | None) -> Iterator[dict[str, int]]:
    """For each axis, by its name, which of its layouts: all combinations, or the chosen one."""
    if choice is not None:
        if all(axis.name in choice.layouts for axis in axes):
            yield dict(choice.layouts)
        return
    options = {axis.name: range(len(axis.layouts or ())) for axis in axes}
    for numbers in islice(product(*options.values()), MOST_LAYOUTS):
        yield dict(zip(options, numbers, strict=True))


def _cuts(
    axes: list[Axis], chosen: Mapping[str, int], remaining: Mapping[str, Tensor]
) -> dict[str, dict[int, Tensor]]:
    """The indices that stay: by tensor and axis."""
    cuts: dict[str, dict[int, Tensor]] = {}
    for axis in axes:
        layout: Layout = (axis.layouts or ())[chosen[axis.name]]
        cuts.setdefault(axis.key, {})[axis.axis] = layout(remaining[axis.site.key])
    return cuts


def _cut(by_axis: dict[int, Tensor], tensor: Tensor) -> Tensor:
    for axis, index in by_axis.items():
        tensor = tensor.index_select(axis, index.to(tensor.device))
    return tensor


def _cut_shape(shape: torch.Size, by_axis: dict[int, Tensor]) -> torch.Size:
    return torch.Size(len(by_axis[i]) if i in by_axis else n for i, n in enumerate(shape))


# --- budgets ------------------------------------------------------------------------------------


def parameters_with(model: Any, kind: Kind, counts: Mapping[str, int]) -> int | None:
    """How many parameters a stock model with so many units has; None if there is none."""
    anatomy = Anatomy.of(model)
    sites = sites_of(anatomy, [kind])
    for form, config, _ in smaller_forms(model, sites, counts):
        try:
            smaller = on_meta(form, config)
        except Exception:  # whatever a config or a constructor may raise
            continue
        before, after = ({k: t.shape for k, t in m.state_dict().items()} for m in (model, smaller))
        axes = list(shrunk_axes(anatomy, before, after, sites, counts))
        if axes and all(axis.layouts for axis in axes):
            smaller.tie_weights()
            return sum(p.numel() for p in smaller.parameters())
    return None


def _check_shapes(stock: Stock, shapes: Shapes) -> None:
    try:
        wanted = {k: t.shape for k, t in on_meta(stock.kind, stock.config).state_dict().items()}
    except Exception as error:
        raise UnsupportedModel(
            f"transformers cannot build {stock.kind.__name__} of the remaining layers: "
            f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        ) from error
    if wanted != shapes:
        odd = sorted(wanted.keys() ^ shapes.keys()) or ["shapes"]
        raise UnsupportedModel(
            f"{stock.kind.__name__} with the remaining layers has other tensors ({odd[0]})"
        )
