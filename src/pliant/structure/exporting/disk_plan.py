"""What a model on disk becomes without what its gates close, found without running all of it.

Shapes make the plan, except for one question: how units lie in an axis that has shrunk. It is
answered on a model of a few real layers, one of each kind, and the answer holds for all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pliant.adapters.stock import PROBE, bound_of, difference_of, logits_of
from pliant.anatomy import Anatomy
from pliant.anatomy.config import layer_types, text_config
from pliant.anatomy.trial import trial_ids
from pliant.errors import InvalidInput, UnsupportedModel
from pliant.structure.config import Kind
from pliant.structure.exporting.closest import closest
from pliant.structure.exporting.disk_model import DiskModel
from pliant.structure.exporting.export import PARTS, smallest
from pliant.structure.exporting.remaining import (
    folded,
    remaining_layers,
    remaining_units,
    removed_units,
    why_not_uniform,
)
from pliant.structure.exporting.saved import DiskAdapters
from pliant.structure.gates import Gates
from pliant.structure.stock.lazy_state import State
from pliant.structure.stock.smaller import Choice, Stock, with_fewer, without_layers
from pliant.structure.units import sites_of


@dataclass(frozen=True, eq=False)
class Plan:
    stock: Stock
    """The smaller model, whose tensors are read and sliced when they are asked for."""
    empty: State
    """The same tensors without values."""
    removed: dict[str, int]


@torch.no_grad()
def plan_from_disk(base: DiskModel, saved: DiskAdapters, *, zeros: bool = False) -> Plan:
    depth = len(base.anatomy.layers)
    open_layers = remaining_layers(saved.gates, depth)
    if not open_layers:
        raise InvalidInput("no layer would remain: open the gate of one at least")
    state = folded(base.model, base.state, saved.gates, saved.compensation, saved.weight)
    units, choices = _choices(base, saved.gates, open_layers, state, zeros)
    removed = {str(kind): removed_units(saved.gates, kind, own) for kind, own in units.items()}
    if len(open_layers) < depth:
        removed["layers"] = depth - len(open_layers)
    stock = _stock(base, open_layers, units, choices, state)
    return Plan(stock, dict(_stock(base, open_layers, units, choices, base.empty).state), removed)


def _choices(
    base: DiskModel, gates: list[Gates], open_layers: list[int], state: State, zeros: bool
) -> tuple[dict[Kind, Mapping[str, Tensor]], dict[Kind, Choice]]:
    """The units that stay of each kind, and how fewer are written, found on some layers alone."""
    units: dict[Kind, Mapping[str, Tensor]] = {}
    choices: dict[Kind, Choice] = {}
    if not any(remaining_units(gates, kind) for kind in PARTS):
        return units, choices
    layers, sample = _sample(base, open_layers, state)
    probe = trial_ids(Anatomy.of(sample), PROBE)
    reference = logits_of(sample, probe)

    def closest_sample(kind: Kind, own: Mapping[str, Tensor]) -> tuple[Stock, Any] | None:
        if why := why_not_uniform(gates, kind, own):
            raise UnsupportedModel(why)
        remaining = _renumbered(base, kind, own, layers)
        if not remaining:
            return None
        agree = partial(_difference, probe, reference)
        return closest(with_fewer(sample, kind, remaining), agree, kind, bound_of(reference))

    for kind in PARTS:
        fewer = smallest(gates, kind, partial(closest_sample, kind), zeros=zeros)
        if fewer is not None and (closest_of_sample := fewer[1]) is not None:
            units[kind], (stock, sample) = fewer[0], closest_of_sample
            assert stock.choice is not None
            choices[kind] = stock.choice
    return units, choices


def _difference(probe: Tensor, reference: Tensor, model: Any) -> float:
    return difference_of(logits_of(model, probe), reference)


def _sample(base: DiskModel, open_layers: list[int], state: State) -> tuple[list[int], Any]:
    """A model of one layer of each kind, in memory; or of more, if its class cannot build those."""
    one_of_each = _one_of_each(base, open_layers)
    prefix = open_layers[: open_layers.index(one_of_each[-1]) + 1]
    for layers in (one_of_each, prefix):
        try:
            model = without_layers(base.model, layers, state).build()
        except UnsupportedModel:
            if layers is prefix:
                raise
            continue
        return layers, model.to(base.device)
    raise AssertionError


def _one_of_each(base: DiskModel, open_layers: list[int]) -> list[int]:
    types = layer_types(text_config(base.model), len(base.anatomy.layers))
    first: dict[Any, int] = {}
    for i in open_layers:
        shapes = {key: t.shape for key, t in base.anatomy.layers[i].state_dict().items()}
        first.setdefault((types[i], frozenset(shapes.items())), i)
    return sorted(first.values())


def _renumbered(
    base: DiskModel, kind: Kind, units: Mapping[str, Tensor], layers: list[int]
) -> dict[str, Tensor]:
    """The units of these layers, by the keys that they have in a model of these layers alone."""
    return {
        f"{layers.index(site.layer)}{site.key.removeprefix(str(site.layer))}": units[site.key]
        for site in sites_of(base.anatomy, [kind])
        if site.layer in layers
    }


def _stock(
    base: DiskModel,
    open_layers: list[int],
    units: Mapping[Kind, Mapping[str, Tensor]],
    choices: Mapping[Kind, Choice],
    state: State,
) -> Stock:
    """The smaller model, by the choices."""
    stock = Stock(base.model.config, type(base.model), state)
    if len(open_layers) < len(base.anatomy.layers):
        stock = without_layers(base.model, open_layers, state)
    for kind, choice in choices.items():
        remaining = _renumbered(base, kind, units[kind], open_layers)
        skeleton = stock.skeleton()
        stock = next(with_fewer(skeleton, kind, remaining, state=stock.state, choice=choice))
    return stock
