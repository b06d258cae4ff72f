"""Export a pruned model: a smaller stock checkpoint that needs no Pliant, proven equal.

    result = export(model, "smaller", tokenizer)
    AutoModelForCausalLM.from_pretrained("smaller")

Gates at 0 become removed heads, channels and layers; other gates and new weights are multiplied
into the projections. The copy is written to a temporary folder, reloaded with plain transformers,
compared with the live model, and only then renamed to its target.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
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
from pliant.structure.smaller import Stock, units_of, with_fewer, without_layers
from pliant.structure.units import Site

BOUNDS = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.01}
"""The largest difference of a logit from the live model's, relative to the largest logit."""
RECORD = "pliant_export.json"
PROBE = 24  # tokens in each of the two rows that the models are compared on


def export(model: nn.Module, folder: str | Path, tokenizer: Any = None) -> ExportResult:
    """Write `model`, with its gates and new weights, to a new folder as a stock checkpoint."""
    target = Path(folder).expanduser()
    check_new(target)
    base: Any = unwrap(model)
    gates, compensation = _adapters(base)
    _check_base(base)
    probe = trial_ids(Anatomy.of(base), PROBE)
    with eval_mode(base):
        live = _logits(base, probe)
        smaller, removed = _smaller(base, gates, compensation, probe, live)
    with new_folder(target) as unfinished:
        _save(smaller, base, tokenizer, unfinished)
        difference = _proof(unfinished, base, probe, live)
        result = _result(target, base, smaller, removed, difference)
        (unfinished / RECORD).write_text(
            json.dumps({"pliant": __version__, **result.as_dict()}, indent=2) + "\n"
        )
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
    own = _folded(base, gates, compensation)
    current = Stock(base.config, type(base), own).build()
    removed: dict[str, int] = {}
    for kind in ("heads", "channels"):
        remaining = _remaining(gates, kind)
        if remaining:
            current = _closest(with_fewer(current, kind, remaining), probe, live, kind, gates)
            counts = {s.key: s for g in gates for s in g.sites if s.kind == kind}
            removed[kind] = sum(
                (units_of(s) - len(remaining[key])) * (s.count // units_of(s))
                for key, s in counts.items()
            )
    layers = _remaining_layers(gates)
    depth = len(Anatomy.of(base).layers)
    if len(layers) < depth:
        current = without_layers(current, layers).build()
        removed["layers"] = depth - len(layers)
    return current, removed


def _closest(
    candidates: Iterable[Stock], probe: Tensor, live: Tensor, kind: str, gates: list[Gates]
) -> Any:
    """The first candidate that computes what the live model does, its removed layers gated."""
    best = float("inf")
    for stock in candidates:
        model = stock.build()
        with _layers_closed(model, gates):
            best = min(best, difference := _difference(_logits(model, probe), live))
        if difference <= BOUNDS.get(live.dtype, 0.05):
            return model
    raise UnsupportedModel(
        f"a model with fewer {kind} computes something else (by {best:.2g}): their number enters "
        "elsewhere. Layers and zeroed weights can be exported"
    )


def _folded(base: Any, gates: list[Gates], compensation: Compensation | None) -> dict[str, Tensor]:
    """The base's tensors, with new weights, and gates of heads and channels multiplied in."""
    state = dict(base.state_dict())
    if compensation is not None:
        for (kind, name), site in compensation.sites().items():
            key = f"{path_of(base, site.module)}.weight"
            new = compensation.weight(kind, name)
            state[key] = (new if site.axis == 1 else new.T).to(state[key])
    for site, gate in _gates_of(gates):
        if site.kind in ("layers", "attention", "mlp"):
            continue
        if site.kind == "experts":
            if not bool((gate == 1).all()):
                raise UnsupportedModel(
                    "gates on experts cannot be exported: a router without an expert chooses others"
                )
            continue
        if site.slices is not None:  # zeroed, for no stock shape lacks them
            key = f"{path_of(base, site.module)}.{site.slices.parameter}"
            state[key] = site.slices.scaled(state[key], gate.to(state[key]))
            continue
        key = f"{path_of(base, site.module)}.weight"
        weight = state[key]
        scale = gate.to(weight).repeat_interleave(site.width)
        state[key] = weight * (scale if site.axis == 1 else scale[:, None])
    return state


def _gates_of(gates: list[Gates]) -> Iterator[tuple[Site, Tensor]]:
    for own in gates:
        for site in own.sites:
            yield site, own[site.kind, site.layer, site.block].detach()


def _remaining(gates: list[Gates], kind: Kind) -> dict[str, Tensor]:
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


def _remaining_layers(gates: list[Gates]) -> list[int]:
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
    depth = len(gates[0].anatomy.layers) if gates else 0
    return [i for i in range(depth) if layers.get(i, 1.0) != 0]


# --- the proof -----------------------------------------------------------------------------------


@contextmanager
def _layers_closed(model: Any, gates: list[Gates]) -> Iterator[None]:
    """Closes the layers of another model that these gates close."""
    remaining = _remaining_layers(gates)
    closed = [i for i in range(len(Anatomy.of(model).layers)) if i not in remaining]
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


@torch.no_grad()
def _logits(model: Any, probe: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=probe, use_cache=False).logits
    return logits


def _difference(ours: Tensor, theirs: Tensor) -> float:
    largest = max(1.0, float(theirs.abs().max()))
    difference = float((ours.to(theirs) - theirs).abs().max()) / largest
    return difference if difference == difference else float("inf")


def _proof(folder: Path, base: Any, probe: Tensor, live: Tensor) -> float:
    """Reload with plain transformers; raise unless it agrees with the live model."""
    again = AutoModelForCausalLM.from_pretrained(
        folder, dtype=base.dtype, attn_implementation=base.config._attn_implementation
    ).eval()
    difference = _difference(_logits(again.to(probe.device), probe), live)
    bound = BOUNDS.get(live.dtype, 0.05)
    if difference > bound:
        raise UnsupportedModel(
            f"the reloaded {type(again).__name__} does not agree with the live model: its logits "
            f"differ by {difference:.2g}, and {bound:g} is allowed in {base.dtype}. Nothing was "
            "written"
        )
    return difference


def _save(smaller: Any, base: Any, tokenizer: Any, folder: Path) -> None:
    smaller.generation_config = base.generation_config
    smaller.save_pretrained(folder)
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
