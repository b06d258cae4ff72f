"""Export a pruned model: a smaller stock checkpoint that needs no Pliant, proven equal.

    result = export(model, "smaller", tokenizer)
    AutoModelForCausalLM.from_pretrained("smaller")

Gates at 0 become removed heads, channels and layers; other gates and new weights are multiplied
into the projections. The copy is written to a temporary folder, reloaded with plain transformers,
compared with the live model, and only then renamed to its target.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from pliant import __version__
from pliant.adapters import attached
from pliant.adapters.files import check_new, new_folder
from pliant.adapters.fingerprint import is_packed
from pliant.anatomy import Anatomy
from pliant.anatomy.find import path_of, unwrap
from pliant.anatomy.modes import eval_mode
from pliant.anatomy.trial import trial_ids
from pliant.errors import InvalidInput, UnsupportedModel
from pliant.structure.compensation import Compensation
from pliant.structure.config import GateConfig, Kind
from pliant.structure.gates import Gates, attach
from pliant.structure.lazy_state import LazyState, State
from pliant.structure.remaining_experts import RemainingExperts
from pliant.structure.smaller import Stock, with_fewer, without_layers
from pliant.structure.units import Site, units_of

BOUNDS = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.01}
"""The largest difference of a logit from the live model's, relative to the largest logit."""
RECORD = "pliant_export.json"
PARTS: tuple[Kind, ...] = ("heads", "channels")
SHARD_SIZE = "5GB"
STEPS = 3
Report = Callable[[str, int, int], None]
"""What is being done, how many steps of it are done, and of how many."""
PROBE = 24  # tokens in each of the two rows that the models are compared on


def export(
    model: nn.Module,
    folder: str | Path,
    tokenizer: Any = None,
    *,
    max_shard_size: str = SHARD_SIZE,
    report: Report | None = None,
) -> ExportResult:
    """Write `model`, with its gates and new weights, to a new folder as a stock checkpoint.

    The smaller model shares what is not sliced with the base. For models that do not fit into
    memory there is `export_from_disk`.
    """
    report = report or nothing
    target = Path(folder).expanduser()
    check_new(target)
    base: Any = unwrap(model)
    gates, compensation = _adapters(base)
    _check_base(base)
    probe = trial_ids(Anatomy.of(base), PROBE)
    with eval_mode(base):
        live = logits_of(base, probe)
        report("building the smaller model", 0, STEPS)
        smaller, removed = _smaller(base, gates, compensation, probe, live)
    with new_folder(target) as unfinished:
        report("writing", 1, STEPS)
        _save(smaller, base, tokenizer, unfinished, max_shard_size)
        report("comparing", 2, STEPS)
        difference = _proof(unfinished, base, probe, live)
        result = _result(target, base, smaller, removed, difference)
        (unfinished / RECORD).write_text(
            json.dumps({"pliant": __version__, **result.as_dict()}, indent=2) + "\n"
        )
    report("exported", STEPS, STEPS)
    return result


@dataclass(frozen=True)
class ExportResult:
    """The exported model, and how closely it agrees with the live one."""

    folder: str
    architecture: str
    removed: dict[str, int]
    """How many units of each kind are gone: heads, channels, layers."""
    parameters: int
    parameters_before: int
    difference: float
    """The largest between logits of the reloaded copy and of the live model, relative to the
    largest logit."""
    bound: float
    dtype: str

    def as_dict(self) -> dict[str, Any]:
        """All but the folder, which depends on the machine and not on the model."""
        return {name: value for name, value in asdict(self).items() if name != "folder"}

    def __str__(self) -> str:
        gone = ", ".join(f"{count:,} {kind}" for kind, count in self.removed.items()) or "nothing"
        share = 1 - self.parameters / self.parameters_before
        return (
            f"{self.folder}: a stock {self.architecture} of {self.parameters:,} parameters "
            f"({share:.1%} fewer: {gone} removed), whose logits are within {self.difference:.1e} "
            f"of the live model's (allowed: {self.bound:g})"
        )


# --- what is exported ----------------------------------------------------------------------------


def _adapters(base: nn.Module) -> tuple[list[Gates], Compensation | None]:
    own = attached(base)
    gates = [a for a in own.values() if isinstance(a, Gates)]
    news = [a for a in own.values() if isinstance(a, Compensation)]
    for name, adapter in own.items():
        if adapter not in gates and adapter not in news and adapter.why_no_export:
            raise UnsupportedModel(
                f"{name} is attached, and {adapter.why_no_export}: detach it to export the rest"
            )
    if len(news) > 1:
        raise InvalidInput("two compensations are attached: detach one")
    return gates, news[0] if news else None


def _check_base(base: Any) -> None:
    if is_packed(base):
        raise UnsupportedModel("the model is quantised: load it in 16 or 32 bits to export it")
    if any(hasattr(module, "base_layer") for module in base.modules()):
        raise UnsupportedModel("the model has LoRA layers: merge them (merge_and_unload) first")
    if any(p.is_meta for p in base.parameters()):
        raise UnsupportedModel("part of the model is offloaded: load all of it to export it")


@torch.no_grad()
def _smaller(
    base: Any, gates: list[Gates], compensation: Compensation | None, probe: Tensor, live: Tensor
) -> tuple[Any, dict[str, int]]:
    """The smaller model, and how many units of each kind it lacks.

    Kind after kind: after each, the model is compared with one that has gates on the rest.
    """
    current, state = base, folded(base, base.state_dict(), gates, compensation)
    removed: dict[str, int] = {}

    def agree(model: Any) -> float:
        with _layers_closed(model, gates):
            return difference_of(logits_of(model, probe), live)

    if closed := closed_experts(base):
        # The first of all: to the live model, whatever its other gates do, they are gone.
        candidates = with_fewer(current, "experts", closed.remaining, state=state)
        _, current = closest(candidates, agree, "experts", bound_of(live))
        state = current.state_dict()
        removed["experts"] = sum(map(len, closed.config.removed.values()))
    for kind in PARTS:
        units = remaining_units(gates, kind)
        if units:
            candidates = with_fewer(current, kind, units, state=state)
            _, current = closest(candidates, agree, kind, bound_of(live))
            state = current.state_dict()
            removed[kind] = removed_units(gates, kind, units)
    depth = len(Anatomy.of(base).layers)
    layers = remaining_layers(gates, depth)
    if len(layers) < depth:
        current = without_layers(current, layers, state).build()
        removed["layers"] = depth - len(layers)
    elif current is base:
        current = Stock(base.config, type(base), state).build()
    return current, removed


def closest(
    candidates: Iterable[Stock], agree: Callable[[Any], float], kind: Kind, bound: float
) -> tuple[Stock, Any]:
    """The first candidate that computes the same, and the model that it builds.

    `agree` says by how much the logits of a model differ from what they should be.
    """
    best = float("inf")
    for stock in candidates:
        model = stock.build()
        best = min(best, difference := agree(model))
        if difference <= bound:
            return stock, model
    raise UnsupportedModel(
        f"a model with fewer {kind} computes something else (by {best:.2g}): their number enters "
        "elsewhere. Layers and zeroed weights can be exported"
    )


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

    Heads leave in groups that share a KV head. Every layer must lose as many.
    """
    remaining: dict[str, Tensor] = {}
    closed: dict[str, float] = {}
    for site, gate in _gates_of(gates):
        if site.kind != kind:
            continue
        open_ = gate.view(units_of(site), -1) != 0
        units = open_.any(dim=1)
        remaining[site.key] = units.nonzero().flatten().cpu()
        closed[site.key] = 1 - float(units.float().mean())
    if not any(closed.values()):
        return {}
    if len({round(share, 6) for share in closed.values()}) > 1:
        few = ", ".join(f"layer {k} {share:.0%}" for k, share in list(closed.items())[:3])
        raise UnsupportedModel(
            f"layers lose different shares of their {kind} ({few}, ...), and a stock config has "
            "one number for all: prune uniformly"
        )
    return remaining


def removed_units(gates: list[Gates], kind: Kind, remaining: Mapping[str, Tensor]) -> int:
    """How many heads or channels are gone, of all layers."""
    sites = {s.key: s for g in gates for s in g.sites if s.kind == kind}
    return sum(
        (units_of(site) - len(remaining[key])) * (site.count // units_of(site))
        for key, site in sites.items()
    )


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


# --- the proof -----------------------------------------------------------------------------------


@contextmanager
def _layers_closed(model: Any, gates: list[Gates]) -> Iterator[None]:
    """Closes the layers of another model that these gates close."""
    depth = len(Anatomy.of(model).layers)
    closed = sorted(set(range(depth)) - set(remaining_layers(gates, depth)))
    if not closed:
        yield
        return
    own = attach(model, GateConfig(("layers",)))
    try:
        for i in closed:
            own["layers", i].zero_()
        yield
    finally:
        own.detach()


def bound_of(logits: Tensor) -> float:
    """The largest difference that is allowed in this precision."""
    return BOUNDS.get(logits.dtype, 0.05)


@torch.no_grad()
def logits_of(model: Any, probe: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=probe, use_cache=False).logits
    return logits


def difference_of(ours: Tensor, theirs: Tensor) -> float:
    largest = max(1.0, float(theirs.abs().max()))
    difference = float((ours.to(theirs) - theirs).abs().max()) / largest
    return difference if difference == difference else float("inf")


def _proof(folder: Path, base: Any, probe: Tensor, live: Tensor) -> float:
    """Reload with plain transformers; raise unless it agrees with the live model."""
    again = AutoModelForCausalLM.from_pretrained(
        folder, dtype=base.dtype, attn_implementation=base.config._attn_implementation
    ).eval()
    difference = difference_of(logits_of(again.to(probe.device), probe), live)
    if difference > bound_of(live):
        raise disagreement(again, difference, live)
    return difference


def disagreement(again: nn.Module, difference: float, live: Tensor) -> UnsupportedModel:
    """The error of a reloaded model that computes something else than the live one."""
    return UnsupportedModel(
        f"the reloaded {type(again).__name__} does not agree with the live model: its logits "
        f"differ by {difference:.2g}, and {bound_of(live):g} is allowed in {live.dtype}. Nothing "
        "was written"
    )


def nothing(what: str, done: int, total: int) -> None:
    """Reports nothing."""


def _save(smaller: Any, base: Any, tokenizer: Any, folder: Path, shard_size: str) -> None:
    smaller.generation_config = base.generation_config
    smaller.save_pretrained(folder, max_shard_size=shard_size)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _result(
    target: Path, base: Any, smaller: Any, removed: dict[str, int], difference: float
) -> ExportResult:
    own = {id(p) for a in attached(base).values() for p in a.parameters()}
    return ExportResult(
        folder=str(target),
        architecture=type(smaller).__name__,
        removed=removed,
        parameters=sum(p.numel() for p in smaller.parameters()),
        parameters_before=sum(p.numel() for p in base.parameters() if id(p) not in own),
        difference=difference,
        bound=BOUNDS.get(base.dtype, 0.05),
        dtype=str(base.dtype).removeprefix("torch."),
    )
