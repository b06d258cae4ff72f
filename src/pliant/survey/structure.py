"""Questions about structure: do gates hold, and is there a stock model with fewer units?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from pliant.errors import UnsupportedModel
from pliant.structure import GateConfig, Gates, attach, sites_of
from pliant.structure.agency import attach_agency
from pliant.structure.config import Kind
from pliant.structure.facade import load_adaptive_model
from pliant.structure.pruning.remaining_experts import attach as attach_remaining_experts
from pliant.structure.stock.smaller import Stock, with_fewer, without_layers
from pliant.structure.units import Site, units_of
from pliant.survey.capability import YES, Specimen, Verdict, register, yes_if
from pliant.survey.complexity import compare, generate

OTHERS: tuple[Kind, ...] = ("expert_channels", "recurrent_heads")

PADS, NEAR = 3, 1e-3
"""Of logits near 1 beside other tokens, which change them a hundred times more if visible."""

CLOSE = 1e-5
"""Sums without the terms that are zero may round otherwise."""


@register("structure", "head gates", needs=["layers"])
def head_gates(specimen: Specimen) -> Verdict:
    """Can attention heads be switched off?

    Do gates on heads change no bit at 1, and equal zeroing a slice of W_o at 0?
    """
    return _gates_hold(specimen, "heads")


@register("structure", "mlp gates", needs=["layers"])
def mlp_gates(specimen: Specimen) -> Verdict:
    """Can channels of the MLP, or experts of a mixture, be switched off?

    The same for channels of the MLP, experts of a mixture, or both.
    """
    anatomy, every = specimen.anatomy, range(len(specimen.anatomy.layers))
    kinds: list[Kind] = ["channels"] if any(anatomy.mlps(i) for i in every) else []
    kinds += ["experts"] if any(anatomy.mixtures(i) for i in every) else []
    if not kinds and any(anatomy.expert_channels(i) for i in every):
        kinds = ["expert_channels"]
    verdicts = [_gates_hold(specimen, kind) for kind in kinds]
    reasons = [anatomy.why_no_mlp(0), anatomy.why_no_mixture(0)]
    nothing = Verdict(False, "; ".join(reason for reason in reasons if reason))
    return next((v for v in verdicts if not v.ok), verdicts[0] if verdicts else nothing)


@register("structure", "other gates", needs=["layers"])
def other_gates(specimen: Specimen) -> Verdict:
    """Can channels of experts, and recurrent heads, be switched off, where there are any?

    The same for channels of experts and for recurrent heads, where there are any.
    """
    kinds = [kind for kind in OTHERS if _has(specimen, kind)]
    verdicts = [_gates_hold(specimen, kind) for kind in kinds]
    has = f"it has {' and '.join(kinds)}" if kinds else ""
    return next((v for v in verdicts if not v.ok), Verdict(True, has))


@register("structure", "layer gates", needs=["layers"])
def layer_gates(specimen: Specimen) -> Verdict:
    """Can whole layers be switched off?

    Do gates on layers change no bit at 1, and act at 0?
    """
    return _gates_hold(specimen, "layers")


@register("structure", "gate gradients", needs=["layer gates"])
def gate_gradients(specimen: Specimen) -> Verdict:
    """Can it be learned which of these to switch off?

    Do gates on heads, channels of experts, recurrent heads and layers have gradients?
    """
    with _gated(specimen, *_gated_kinds(specimen)) as gates:
        logits = specimen.model(input_ids=specimen.ids, use_cache=False).logits
        gradients = torch.autograd.grad(
            logits.float().logsumexp(-1).sum(), list(gates.parameters()), allow_unused=True
        )
    reached = sum(gradient is not None and bool(gradient.any()) for gradient in gradients)
    # A layer that runs only when there is an image has none.
    return yes_if(2 * reached >= len(gradients), "no gradient reaches the gates")


@register("structure", "gated cache", needs=["cached", "layer gates"])
def gated_cache(specimen: Specimen) -> Verdict:
    """With some of these scaled, does its cache still work?

    With gates away from 1, does generation with the cache equal generation without?
    """
    with _gated(specimen, *_gated_kinds(specimen)) as gates:
        _scatter(gates)
        cached, without = (generate(specimen, specimen.ids, use_cache=c) for c in (True, False))
    return compare(cached, without, "with the cache", "without")


@register("structure", "gated padding", needs=["layer gates"])
def gated_padding(specimen: Specimen) -> Verdict:
    """With some of these scaled, does padding still change nothing?

    With gates away from 1, are later tokens and padding on either side still invisible?
    """
    bare = _differences(specimen)
    with _gated(specimen, *_gated_kinds(specimen)) as gates:
        _scatter(gates)
        gated = _differences(specimen)
    worse = [name for name in bare if bare[name] <= NEAR < gated[name]]
    if worse:
        return Verdict(False, f"gates make {' and '.join(worse)} visible")
    seen = [name for name in bare if bare[name] > NEAR]
    return Verdict(True, f"without gates {' and '.join(seen)} change the logits" if seen else "")


@register("structure", "agency", needs=["head gates"])
def agency(specimen: Specimen) -> Verdict:
    """Can heads be observed, and have a state (active, withdrawn, ...)?

    Do states of heads change no bit while all are active, and can every head be observed?
    """
    with _gated(specimen, "heads") as gates:
        states = attach_agency(gates)
        try:
            if not torch.equal(specimen.run(), specimen.logits):
                return Verdict(False, "active heads change the logits")
            states.set_head_state(gates.sites[0].layer, 0, "withdrawn")
            if torch.equal(specimen.run(), specimen.logits):
                return Verdict(False, "a withdrawn head has no effect")
            states.observe({"input_ids": specimen.ids})
        finally:
            states.detach()
    if not torch.equal(specimen.run(), specimen.logits):
        return Verdict(False, "observing leaves a trace in the model")
    return YES


@register("structure", "blocks", needs=["head gates"])
def blocks(specimen: Specimen) -> Verdict:
    """Does Sentinel's loop over blocks and heads work on it?

    Does the seed's loop over blocks and heads reach every head, and does each act?
    """
    adaptive = load_adaptive_model(specimen.model.config.model_type, specimen.model)
    try:
        counts = {block["attn"].num_heads for block in adaptive.blocks}
        if len(counts) > 1:
            return Verdict(False, f"its blocks have {sorted(counts)} heads, not as many in each")
        if any(len(block) > 1 for block in adaptive.blocks):
            return Verdict(False, "its blocks have two attentions: 'attn' and 'attn_1'")
        for block in adaptive.blocks:
            with torch.no_grad():
                for head in range(block["attn"].num_heads):
                    block["attn"].gate[head] = 0.001
        changed = not torch.equal(specimen.run(), specimen.logits)
        left = int((torch.cat(list(adaptive.gates.parameters())) != 0.001).sum())
        return yes_if(changed and not left, f"{left} heads are in no block")
    finally:
        adaptive.detach()


@register("structure", "fewer heads", needs=["head gates"])
def fewer_heads(specimen: Specimen) -> Verdict:
    """Can heads be removed, so that a smaller stock model is left?

    Does the stock model with half of the heads (or their KV groups) equal the gated one?
    """
    return _has_smaller_form(specimen, "heads")


@register("structure", "fewer channels", needs=["mlp", "mlp gates"])
def fewer_channels(specimen: Specimen) -> Verdict:
    """Can channels be removed, so that a smaller stock model is left?

    Does the stock model with half of the channels equal the gated one?
    """
    return _has_smaller_form(specimen, "channels")


@register("structure", "fewer experts", needs=["mlp gates"])
def fewer_experts(specimen: Specimen) -> Verdict:
    """Can experts of a mixture be removed, so that a smaller stock model is left?

    Does the stock model with three quarters of a mixture's experts equal the one whose routers
    choose among them?
    """
    generator = torch.Generator().manual_seed(0)
    removed = {
        site.key: torch.randperm(site.count, generator=generator)[: site.count // 4].tolist()
        for site in sites_of(specimen.anatomy, ["experts"])
    }
    adapter = attach_remaining_experts(specimen.model, removed)
    try:
        live = specimen.run()
        if torch.equal(live, specimen.logits):
            return Verdict(False, "the logits do not depend on the experts")
        smaller = with_fewer(specimen.model, "experts", adapter.remaining)
        return _any_equals(smaller, specimen, live)
    finally:
        adapter.detach()


@register("structure", "fewer layers", needs=["layer gates"])
def fewer_layers(specimen: Specimen) -> Verdict:
    """Can layers be removed, so that a smaller stock model is left?

    Does the stock model without one layer equal the model with that layer's gate at 0?
    """
    depth, gone = len(specimen.anatomy.layers), 1
    if depth < 2:
        return Verdict(False, "it has one layer")
    with _gated(specimen, "layers") as gates, torch.no_grad():
        gates["layers", gone].zero_()
        live = specimen.run()
    try:
        smaller = without_layers(specimen.model, [i for i in range(depth) if i != gone])
    except UnsupportedModel:
        return Verdict(False, "its class does not build the remaining layers")
    return _equals(smaller, specimen, live)


# --- gates ---------------------------------------------------------------------------------------


@contextmanager
def _gated(specimen: Specimen, *kinds: Kind) -> Iterator[Gates]:
    gates = attach(specimen.model, GateConfig(kinds))
    try:
        yield gates
    finally:
        gates.detach()


def _scatter(gates: Gates) -> None:
    """Every gate somewhere in [0.5, 1.5]."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for gate in gates.parameters():
            gate.copy_(0.5 + torch.rand(gate.shape, generator=generator))


def _differences(specimen: Specimen) -> dict[str, float]:
    """How much the logits depend on what must not matter; infinite where the model fails on it."""
    ids, pads = specimen.ids[:1], torch.full((1, PADS), 4)
    changed = specimen.ids.clone()
    changed[:, -1] = (changed[:, -1] + 7) % 90 + 5
    left = torch.cat([torch.zeros_like(pads), torch.ones_like(ids)], 1)
    after = {"attention_mask": left, "position_ids": (left.cumsum(1) - 1).clamp(min=0)}
    runs: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
        "later tokens": lambda: (specimen.run()[:, :-1], specimen.run(changed)[:, :-1]),
        "padding on the right": lambda: (
            specimen.run(ids),
            specimen.run(torch.cat([ids, pads], 1), attention_mask=left.flip(1))[:, :-PADS],
        ),
        "padding on the left": lambda: (
            specimen.run(ids),
            specimen.run(torch.cat([pads, ids], 1), **after)[:, PADS:],
        ),
    }
    return {name: _difference(run) for name, run in runs.items()}


def _difference(run: Callable[[], tuple[Tensor, Tensor]]) -> float:
    try:
        ours, theirs = run()
    except Exception:  # some models take no mask, some no positions
        return float("inf")
    difference = float((ours - theirs).abs().max())
    return difference if difference == difference else float("inf")


def _gates_hold(specimen: Specimen, kind: Kind) -> Verdict:
    with _gated(specimen, kind) as gates:
        if not torch.equal(specimen.run(), specimen.logits):
            return Verdict(False, "gates at 1 change the logits")
        sites = gates.sites
        site, first = sites[0], 0 if kind == "layers" else 1
        with torch.no_grad():
            for same in _sharing(sites, site):
                gates[kind, same.layer, same.block][first:] = 0
        closed = specimen.run()
    if torch.equal(closed, specimen.logits):
        return Verdict(False, "a gate at 0 has no effect")
    if kind == "layers":
        return YES
    with _without_weights(site):
        zeroed = specimen.run()
    same_outcome = torch.equal(closed, zeroed)
    if kind == "experts":  # an expert's own outputs are added in another order
        same_outcome = torch.allclose(closed, zeroed, atol=CLOSE)
    return yes_if(same_outcome, "a gate at 0 differs from zeroed weights")


def _sharing(sites: list[Site], site: Site) -> list[Site]:
    """The sites whose modules share their weight (Zamba's layers do)."""
    own = getattr(site.module, "weight", None)
    return [s for s in sites if s is site or (own is not None and s.module.weight is own)]


@contextmanager
def _without_weights(site: Site) -> Iterator[None]:
    """The weights of all units but the first set to zero, and restored at the end."""
    slices = list(_units_after_first(site))
    saved = [part.clone() for part in slices]
    try:
        for part in slices:
            part.zero_()
        yield
    finally:
        for part, before in zip(slices, saved, strict=True):
            part.copy_(before)


def _units_after_first(site: Site) -> Iterator[Tensor]:
    """Their weights, as views."""
    if site.kind == "experts":
        yield from (p.data[1 : site.count] for p in site.module.parameters())
    elif site.slices is not None:
        own = site.slices
        view = getattr(own.holder, own.parameter).data.view(own.view)
        units = view.movedim(own.axes, tuple(range(len(own.axes))))
        yield units[1:]
        if len(own.axes) == 2:
            yield units[0, 1:]
    else:
        weight = site.module.weight
        assert isinstance(weight, Tensor)
        yield weight.data.narrow(site.axis, site.width, (site.count - 1) * site.width)


def _gated_kinds(specimen: Specimen) -> tuple[Kind, ...]:
    """Layers, and those of heads, channels of experts and recurrent heads that the model has."""
    return (*(kind for kind in ("heads", *OTHERS) if _has(specimen, kind)), "layers")


def _has(specimen: Specimen, kind: Kind) -> bool:
    try:
        return bool(sites_of(specimen.anatomy, [kind]))
    except UnsupportedModel:
        return False


# --- smaller models ------------------------------------------------------------------------------


def _has_smaller_form(specimen: Specimen, kind: Kind) -> Verdict:
    sites = sites_of(specimen.anatomy, [kind])
    if any(units_of(site) == 1 for site in sites):
        return Verdict(False, f"a layer has only one unit of its {kind}")
    generator = torch.Generator().manual_seed(0)
    remaining = {}
    with _gated(specimen, kind) as gates, torch.no_grad():
        for site in sites:
            units = units_of(site)
            order = torch.randperm(units, generator=generator)
            remaining[site.key], gone = order[: units // 2].sort().values, order[units // 2 :]
            gates[kind, site.layer, site.block].view(units, -1)[gone] = 0
        live = specimen.run()
    try:
        return _any_equals(with_fewer(specimen.model, kind, remaining), specimen, live)
    except UnsupportedModel:
        return Verdict(False, f"no config of its class has fewer {kind} alone")


def _any_equals(candidates: Iterator[Stock], specimen: Specimen, live: Tensor) -> Verdict:
    """Yes from the first candidate that is equal: the others are not built. Or the first no."""
    verdicts = []
    for stock in candidates:
        verdicts.append(_equals(stock, specimen, live))
        if verdicts[-1].ok:
            return verdicts[-1]
    return verdicts[0]


@torch.no_grad()
def _equals(stock: Stock, specimen: Specimen, live: Tensor) -> Verdict:
    logits = stock.build()(input_ids=specimen.ids, use_cache=False).logits
    largest = max(1.0, float(live.abs().max()))
    difference = float((logits - live).abs().max()) / largest
    return yes_if(difference <= CLOSE, "the smaller model computes something else")
