"""What remains of a model with gates: its units, and its tensors with the gates multiplied in."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from pliant.adapters import attached
from pliant.anatomy.find import path_of
from pliant.errors import InvalidInput, UnsupportedModel
from pliant.structure.config import Kind
from pliant.structure.gates import Gates
from pliant.structure.pruning.compensation import Compensation
from pliant.structure.pruning.remaining_experts import RemainingExperts
from pliant.structure.stock.expert_channels import stacked
from pliant.structure.stock.lazy_state import LazyState, State
from pliant.structure.units import Site, units_of


def _check_expert_gates(site: Site, gate: Tensor, closed: RemainingExperts | None) -> None:
    """Raise if experts that the router still chooses have gates other than 1."""
    gone = () if closed is None else closed.config.removed[site.key]
    changed = [(i, g) for i, g in enumerate(gate.tolist()) if g != 1 and i not in gone]
    if changed:
        expert, value = changed[0]
        raise UnsupportedModel(
            f"expert {expert} of layer {site.layer} has a gate of {value:.3g} and its router still "
            "chooses it, which no stock checkpoint can contain: close it (close_experts, or "
            "RemainingExperts), or set its gate to 1"
        )


def closed_experts(base: nn.Module) -> RemainingExperts | None:
    own = [a for a in attached(base).values() if isinstance(a, RemainingExperts)]
    if len(own) > 1:
        raise InvalidInput("two adapters close experts: detach one")
    return own[0] if own else None


def _gates_of(gates: list[Gates]) -> Iterator[tuple[Site, Tensor]]:
    for own in gates:
        for site in own.sites:
            yield site, own[site.kind, site.layer, site.block].detach()


def remaining_units(gates: list[Gates], kind: Kind) -> dict[str, Tensor]:
    """The units with a gate above 0, by site; empty if that is all of them.

    Heads leave in groups that share a KV head.
    """
    remaining: dict[str, Tensor] = {}
    all_open = True
    for site, gate in _gates_of(gates):
        if site.kind == kind:
            units = (gate.view(units_of(site), -1) != 0).any(dim=1)
            remaining[site.key] = units.nonzero().flatten().cpu()
            all_open = all_open and bool(units.all())
    return {} if all_open else remaining


def ways_to_remove(gates: list[Gates], kind: Kind, *, zeros: bool) -> list[dict[str, Tensor]]:
    """Which units may be left in the smaller model, by site; the smallest way first.

    Closed units have weights of zero, so with `zeros` they may stay: in every layer as many as in
    the one that loses least, or all.
    """
    exact = remaining_units(gates, kind)
    if not exact:
        return []
    padded = _as_many(gates, kind, exact) if zeros else {}
    return [exact, *([padded] if padded and sum(map(len, padded.values())) else [])]


def _as_many(gates: list[Gates], kind: Kind, exact: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same share of every site, filled up with closed units; empty if that is all of them."""
    sites = {site.key: site for site, _ in _gates_of(gates) if site.kind == kind}
    gone = {s.layer for s, gate in _gates_of(gates) if s.kind == "layers" and float(gate) == 0}
    shares = [len(exact[k]) / units_of(s) for k, s in sites.items() if s.layer not in gone]
    most = max(shares, default=0.0)
    filled: dict[str, Tensor] = {}
    for key, site in sites.items():
        count = math.ceil(most * units_of(site) - 1e-6)
        closed = [i for i in range(units_of(site)) if i not in set(exact[key].tolist())]
        filled[key] = torch.tensor(sorted([*exact[key].tolist(), *closed][:count]))
    return filled if most < 1 else {}


def why_not_uniform(gates: list[Gates], kind: Kind, remaining: Mapping[str, Tensor]) -> str:
    """What a stock config cannot express, if layers lose different shares of a kind; else empty."""
    sites = {site.key: site for site, _ in _gates_of(gates) if site.kind == kind}
    closed = {key: 1 - len(remaining[key]) / units_of(site) for key, site in sites.items()}
    if len({round(share, 6) for share in closed.values()}) < 2:
        return ""
    few = ", ".join(f"layer {key} {share:.0%}" for key, share in list(closed.items())[:3])
    return (
        f"layers lose different shares of their {kind} ({few}, ...), and the stock config has one "
        "number for all: prune uniformly (uniform=True), or export with zeros=True, which leaves "
        "weights of zero where a layer loses more than others"
    )


def remaining_expert_channels(
    gates: list[Gates], experts: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """(experts, channels) those that stay in each expert, by site; empty if that is all of them.

    Every expert keeps as many as the one that needs most: closed ones fill up the others. `experts`
    are those that stay, by site, if some are gone.
    """
    opened: dict[str, Tensor] = {}
    gone = {s.layer for s, gate in _gates_of(gates) if s.kind == "layers" and float(gate) == 0}
    most = 0
    for site, gate in _gates_of(gates):
        if site.kind == "expert_channels":
            if (sizes := stacked(site)) is None:
                return {}
            own = (gate.view(sizes) != 0).cpu()
            opened[site.key] = own = own[experts[site.key]] if site.key in experts else own
            if site.layer not in gone:
                most = max(most, int(own.sum(dim=1).max()))
    if not opened or not 0 < most < min(own.shape[1] for own in opened.values()):
        return {}
    return {
        key: own.int().argsort(dim=1, descending=True, stable=True)[:, :most].sort(dim=1).values
        for key, own in opened.items()
    }


def removed_units(gates: list[Gates], kind: Kind, remaining: Mapping[str, Tensor]) -> int:
    """How many heads or channels are gone, of all layers."""
    sites = {s.key: s for g in gates for s in g.sites if s.kind == kind}
    return sum(
        (units_of(site) - len(remaining[key])) * (site.count // units_of(site))
        for key, site in sites.items()
    )


def removed_expert_channels(gates: list[Gates], remaining: Mapping[str, Tensor]) -> int:
    """How many channels are gone, of the experts that stay."""
    sites = {s.key: s for s, _ in _gates_of(gates) if s.kind == "expert_channels"}
    before = {key: size[1] for key, site in sites.items() if (size := stacked(site))}
    return sum((before[key] - own.shape[1]) * len(own) for key, own in remaining.items())


def zeroed_units(gates: list[Gates], kind: Kind, removed: int) -> int:
    """How many closed units are still there, with weights of zero."""
    exact = remaining_units(gates, kind)
    return max(0, removed_units(gates, kind, exact) - removed) if exact else 0


def remaining_layers(gates: list[Gates], depth: int) -> list[int]:
    """The layers, of so many, with a gate at 1."""
    layers = {site.layer: float(gate) for site, gate in _gates_of(gates) if site.kind == "layers"}
    for layer, value in layers.items():
        if value not in (0.0, 1.0):
            raise UnsupportedModel(
                f"layer {layer} has a gate of {value:.3g}, and a stock layer is there or not: set "
                "it to 0 or 1"
            )
    for site, gate in _gates_of(gates):
        if site.kind in ("attention", "mlp") and float(gate) != 1:
            raise UnsupportedModel(f"half a layer ({site.kind} of {site.layer}) cannot be exported")
    return [i for i in range(depth) if layers.get(i, 1.0) != 0]


# --- tensors -------------------------------------------------------------------------------------


def folded(
    base: nn.Module,
    state: State,
    gates: list[Gates],
    compensation: Compensation | None,
    new_weight: Callable[[Kind, str], Tensor] | None = None,
) -> LazyState:
    """The base's tensors, with new weights, and gates of heads and channels multiplied in.

    `new_weight` gives the new weights if `compensation` does not hold them itself.
    """
    changes: dict[str, list[Callable[[Tensor], Tensor]]] = {}
    closed = closed_experts(base)
    if compensation is not None:
        give = new_weight or compensation.weight
        for site in compensation.sites:
            replace = partial(_replaced, site, partial(give, site.kind, site.key))
            changes[f"{path_of(base, site.module)}.weight"] = [replace]
    for site, gate in _gates_of(gates):
        if site.kind in ("layers", "attention", "mlp") or bool((gate == 1).all()):
            continue
        if site.kind == "experts":
            _check_expert_gates(site, gate, closed)
            continue
        name = "weight" if site.slices is None else site.slices.parameter
        key = f"{path_of(base, site.module)}.{name}"
        changes.setdefault(key, []).append(partial(_scaled, site, gate))
    return LazyState.over(state, {key: partial(_in_turn, each) for key, each in changes.items()})


def _replaced(site: Site, give: Callable[[], Tensor], old: Tensor) -> Tensor:
    new = give().detach()
    return (new if site.axis == 1 else new.T).to(old)


def _scaled(site: Site, gate: Tensor, weight: Tensor) -> Tensor:
    if site.slices is not None:  # zeroed, for no stock shape lacks them
        return site.slices.scaled(weight, gate.to(weight))
    scale = gate.to(weight).repeat_interleave(site.width)
    return weight * (scale if site.axis == 1 else scale[:, None])


def _in_turn(changes: list[Callable[[Tensor], Tensor]], tensor: Tensor) -> Tensor:
    for change in changes:
        tensor = change(tensor)
    return tensor
