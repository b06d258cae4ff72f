"""Export a pruned model: a smaller stock checkpoint that needs no Pliant, proven equal.

    result = export(model, "smaller", tokenizer)
    AutoModelForCausalLM.from_pretrained("smaller")

Gates at 0 become removed heads, channels, recurrent heads and layers; other gates and new weights
are multiplied into the projections. The copy is written to a temporary folder, reloaded with plain
transformers, compared with the live model, and only then renamed to its target.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pliant import __version__
from pliant.adapters import attached
from pliant.adapters.stock import (
    PROBE,
    SHARD_SIZE,
    bound_of,
    check_exportable,
    difference_of,
    logits_of,
    proof,
    save,
)
from pliant.anatomy import Anatomy
from pliant.anatomy.find import unwrap
from pliant.anatomy.modes import eval_mode
from pliant.anatomy.trial import trial_ids
from pliant.errors import InvalidInput, UnsupportedModel
from pliant.files import check_new, new_folder
from pliant.structure.config import Kind
from pliant.structure.exporting.closest import closest, layers_closed
from pliant.structure.exporting.remaining import (
    closed_experts,
    folded,
    remaining_expert_channels,
    remaining_layers,
    removed_expert_channels,
    removed_units,
    ways_to_remove,
    why_not_uniform,
    zeroed_units,
)
from pliant.structure.gates import Gates
from pliant.structure.pruning.compensation import Compensation
from pliant.structure.pruning.prune import Report
from pliant.structure.stock.expert_channels import with_fewer_expert_channels
from pliant.structure.stock.smaller import Stock, with_fewer, without_layers

RECORD = "pliant_export.json"
PARTS: tuple[Kind, ...] = ("heads", "channels", "recurrent_heads")
STEPS = 3
Built = TypeVar("Built")


def export(
    model: nn.Module,
    folder: str | Path,
    tokenizer: Any = None,
    *,
    zeros: bool = False,
    max_shard_size: str = SHARD_SIZE,
    report: Report | None = None,
) -> ExportResult:
    """Write `model`, with its gates and new weights, to a new folder as a stock checkpoint.

    The smaller model shares what is not sliced with the base. With `zeros` units that no stock form
    can lack (another number in each layer, a fixed head_dim) stay, with weights of
    zero: that saves no time. For models that do not fit into memory there is `export_from_disk`.
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
        smaller, removed = _smaller(base, gates, compensation, probe, live, zeros)
    with new_folder(target) as unfinished:
        report("writing", 1, STEPS)
        save(smaller, base, tokenizer, unfinished, max_shard_size)
        report("comparing", 2, STEPS)
        difference = proof(unfinished, base, probe, live)
        zeroed = zeroed_kinds(gates, removed)
        result = _result(target, base, smaller, removed, zeroed, difference, bound_of(live))
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
    zeroed: dict[str, int] = field(default_factory=dict)
    """How many closed units of each kind are still there, with weights of zero."""

    def as_dict(self) -> dict[str, Any]:
        """All but the folder, which depends on the machine and not on the model."""
        return {name: value for name, value in asdict(self).items() if name != "folder"}

    def __str__(self) -> str:
        gone = ", ".join(f"{count:,} {kind}" for kind, count in self.removed.items()) or "nothing"
        if self.zeroed:
            zeroed = ", ".join(f"{count:,} {kind}" for kind, count in self.zeroed.items())
            gone += f" removed, {zeroed} zero"
        else:
            gone += " removed"
        share = 1 - self.parameters / self.parameters_before
        return (
            f"{self.folder}: a stock {self.architecture} of {self.parameters:,} parameters "
            f"({share:.1%} fewer: {gone}), whose logits are within {self.difference:.1e} "
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
    check_exportable(base)
    if any(hasattr(module, "base_layer") for module in base.modules()):
        raise UnsupportedModel("the model has LoRA layers: merge them (merge_and_unload) first")


@torch.no_grad()
def _smaller(
    base: Any,
    gates: list[Gates],
    compensation: Compensation | None,
    probe: Tensor,
    live: Tensor,
    zeros: bool,
) -> tuple[Any, dict[str, int]]:
    """The smaller model, and how many units of each kind it lacks.

    Kind after kind: after each, the model is compared with one that has gates on the rest.
    """
    current, state = base, folded(base, base.state_dict(), gates, compensation)
    removed: dict[str, int] = {}

    def agree(model: Any) -> float:
        with layers_closed(model, gates):
            return difference_of(logits_of(model, probe), live)

    def without(kind: Kind, units: Mapping[str, Tensor]) -> Any:
        candidates = with_fewer(current, kind, units, state=state)
        return closest(candidates, agree, kind, bound_of(live))[1]

    if closed := closed_experts(base):
        # The first of all: to the live model, whatever its other gates do, they are gone.
        current = without("experts", closed.remaining)
        state = current.state_dict()
        removed["experts"] = sum(map(len, closed.config.removed.values()))
    for kind in PARTS:
        fewer = smallest(gates, kind, partial(without, kind), zeros=zeros)
        if fewer is not None:
            units, current = fewer
            state = current.state_dict()
            removed[kind] = removed_units(gates, kind, units)
    if units := remaining_expert_channels(gates, closed.remaining if closed else {}):
        with suppress(UnsupportedModel):  # then they stay, with weights of zero
            fewer_channels = with_fewer_expert_channels(current, units, state)
            _, current = closest(fewer_channels, agree, "expert_channels", bound_of(live))
            state = current.state_dict()
            removed["expert_channels"] = removed_expert_channels(gates, units)
    depth = len(Anatomy.of(base).layers)
    layers = remaining_layers(gates, depth)
    if len(layers) < depth:
        current = without_layers(current, layers, state).build()
        removed["layers"] = depth - len(layers)
    elif current is base:
        current = Stock(base.config, type(base), state).build()
    return current, removed


def smallest(
    gates: list[Gates],
    kind: Kind,
    build: Callable[[Mapping[str, Tensor]], Built],
    *,
    zeros: bool,
) -> tuple[Mapping[str, Tensor], Built] | None:
    """The units that stay in the smallest model that can be built, and what `build` returns for it.

    None if no unit can be removed and zeros are allowed in their place, or none is closed.
    """
    refusal: UnsupportedModel | None = None
    for units in ways_to_remove(gates, kind, zeros=zeros):
        try:
            return units, build(units)
        except UnsupportedModel as error:
            why = why_not_uniform(gates, kind, units)
            why = why or f"{error}. With zeros=True they stay, with weights of zero"
            refusal = refusal or UnsupportedModel(why)
    if refusal is not None and not zeros:
        raise refusal
    return None


def zeroed_kinds(gates: list[Gates], removed: Mapping[str, int]) -> dict[str, int]:
    kinds: tuple[Kind, ...] = (*PARTS, "expert_channels")
    counts = {str(kind): zeroed_units(gates, kind, removed.get(kind, 0)) for kind in kinds}
    return {kind: count for kind, count in counts.items() if count}


def nothing(what: str, done: int, total: int) -> None:
    """Reports nothing."""


def _result(
    target: Path,
    base: Any,
    smaller: Any,
    removed: dict[str, int],
    zeroed: dict[str, int],
    difference: float,
    bound: float,
) -> ExportResult:
    own = {id(p) for a in attached(base).values() for p in a.parameters()}
    return ExportResult(
        folder=str(target),
        architecture=type(smaller).__name__,
        removed=removed,
        parameters=sum(p.numel() for p in smaller.parameters()),
        parameters_before=sum(p.numel() for p in base.parameters() if id(p) not in own),
        difference=difference,
        bound=bound,
        dtype=str(base.dtype).removeprefix("torch."),
        zeroed=zeroed,
    )
