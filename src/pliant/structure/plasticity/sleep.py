"""Sleep: of heads that write nearly the same, one is closed, and the others take over.

    result = sleep(gates, batches, held_out)
    print(result)           # what was merged and dropped, and the held-out loss before and after
    result.undo()

What a head writes is what its slice of the output projection adds to the residual stream. Two heads
of a layer are compared by the cosine of what they write on the calibration text, over all tokens
and features; their weights are not compared. A head that writes next to nothing is dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pliant.adapters import attached
from pliant.anatomy.find import device_of
from pliant.anatomy.modes import eval_mode
from pliant.errors import InvalidInput
from pliant.structure.calibration import Batch, Sample, samples_of, without_padding
from pliant.structure.gates import Gates
from pliant.structure.plasticity.config import SleepConfig
from pliant.structure.plasticity.growth import Head, head_sites, mean_loss
from pliant.structure.plasticity.held import refuse_compensated_heads
from pliant.structure.pruning import compensation
from pliant.structure.pruning.compensation import Compensation, dense_weight
from pliant.structure.pruning.least_squares import Statistics, remove_units
from pliant.structure.units import Site


@torch.no_grad()
def sleep(
    gates: Gates,
    batches: Sequence[Batch],
    held_out: Sequence[Batch],
    config: SleepConfig | None = None,
) -> SleepResult:
    """Merge and drop heads of the active pattern; the base keeps its weights.

    What heads write is measured in one pass over `batches`, the loss on `held_out`.
    """
    config, model = config or SleepConfig(), gates.base
    samples, held = (samples_of(own, device_of(model)) for own in (batches, held_out))
    if not samples or not held:
        what = "calibration" if not samples else "held-out"
        raise InvalidInput(f"there is no {what} text: give batches with input_ids")
    refuse_compensated_heads(model)
    before = mean_loss(model, held)
    plans = merger_plans(gates, samples, config)
    changed = [plan for plan in plans if plan.closed]
    own = None
    if changed and config.take_over == "weights":
        own = compensation.attach(model, [plan.site for plan in changed], _free_name(model))
    gates_before = [(_gate(gates, plan.site), _gate(gates, plan.site).clone()) for plan in plans]
    for plan in changed:
        _apply(plan, gates, own, config)
    return SleepResult(
        config,
        heads=sum(site.count for site in head_sites(gates)),
        merged=tuple(merger for plan in plans for merger in plan.merged),
        dropped=tuple((plan.site.key, head) for plan in plans for head in plan.dropped),
        largest_cosine=max(plan.largest_cosine for plan in plans),
        before=before,
        after=mean_loss(model, held),
        compensation=own,
        gates_before=tuple(gates_before),
    )


@dataclass(frozen=True)
class Merger:
    """A head that was closed, and the one of the same layer that it was most like."""

    site: str
    closed: int
    into: int
    cosine: float


@dataclass(frozen=True, eq=False)
class SleepResult:
    """What a sleep did."""

    config: SleepConfig
    heads: int
    merged: tuple[Merger, ...]
    dropped: tuple[Head, ...]
    """As (site, number)."""
    largest_cosine: float
    """Of what two open heads of one layer wrote, before."""
    before: float
    """The held-out loss of a token."""
    after: float
    compensation: Compensation | None = None
    """The new output weights, if others took over by weights."""
    gates_before: tuple[tuple[Tensor, Tensor], ...] = field(default=(), repr=False)

    @torch.no_grad()
    def undo(self) -> None:
        """Open again what was closed; the model is as it was before."""
        if self.compensation is not None:
            self.compensation.detach()
        for gate, value in self.gates_before:
            gate.copy_(value)

    def as_dict(self) -> dict[str, Any]:
        return {
            "config": asdict(self.config),
            "heads": self.heads,
            "merged": [asdict(merger) for merger in self.merged],
            "dropped": [list(head) for head in self.dropped],
            "largest_cosine": self.largest_cosine,
            "before": self.before,
            "after": self.after,
        }

    def __str__(self) -> str:
        if not self.merged and not self.dropped:
            return (
                f"No two of {self.heads} heads write nearly the same (the largest cosine is "
                f"{self.largest_cosine:.2f}), and none writes next to nothing: nothing was changed"
            )
        return (
            f"Of {self.heads} heads, {len(self.merged)} were merged into others and "
            f"{len(self.dropped)} dropped: the held-out loss went from {self.before:.4f} to "
            f"{self.after:.4f}"
        )


# --- which heads ---------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class MergerPlan:
    """What becomes of the heads of one site."""

    site: Site
    merged: tuple[Merger, ...]
    dropped: tuple[int, ...]
    factors: Tensor
    """(heads,) by how much each remaining head must grow to write what was merged into it."""
    statistics: Statistics
    weight_OF: Tensor
    largest_cosine: float

    @property
    def closed(self) -> list[int]:
        return [*(merger.closed for merger in self.merged), *self.dropped]


def products(weight_OF: Tensor, gram_FF: Tensor, width: int) -> Tensor:
    """(heads, heads) the inner products of what each two heads write, summed over tokens."""
    heads = len(gram_FF) // width
    every = (weight_OF.T @ weight_OF).double() * gram_FF.double()
    return every.view(heads, width, heads, width).sum(dim=(1, 3))


def merger_plans(
    gates: Gates,
    samples: Sequence[Sample],
    config: SleepConfig,
    among: Mapping[str, Tensor] | None = None,
) -> list[MergerPlan]:
    """What would become of each site's open heads, or of those `among` them; nothing changes."""
    sites, plans = head_sites(gates), []
    every = _statistics(gates.base, sites, samples)
    for site, statistics in zip(sites, every, strict=True):
        weight = dense_weight(site.module).float()
        inner = products(weight, statistics.gram_FF, site.width)
        statistics.cross_OF = weight @ statistics.gram_FF
        is_open = (_gate(gates, site) != 0).to(inner.device) & (inner.diagonal() > 0)
        if among is not None:
            is_open &= among[site.key].to(is_open)
        plans.append(_plan(site, inner, is_open, config, statistics, weight))
    return plans


def _plan(
    site: Site,
    inner: Tensor,
    is_open: Tensor,
    config: SleepConfig,
    statistics: Statistics,
    weight: Tensor,
) -> MergerPlan:
    squares = inner.diagonal()
    norms = squares.clamp(min=1e-300).sqrt()
    least = config.negligible * squares[is_open].mean().sqrt() if is_open.any() else norms.max()
    dropped = (is_open & (norms < least)).nonzero().flatten().tolist()
    cosines = inner / norms.outer(norms)
    pairs = [
        (float(cosines[i, j]), i, j)
        for i in is_open.nonzero().flatten().tolist()
        for j in range(i)
        if is_open[j] and i not in dropped and j not in dropped
    ]
    closed: set[int] = set()
    keepers: set[int] = set()
    factors, merged = torch.ones(site.count), []
    for cosine, *pair in sorted(pairs, reverse=True):
        # The larger one remains, unless others were merged into the smaller one already.
        goes, stays = sorted(pair, key=lambda head: (head in keepers, float(norms[head])))
        if cosine <= config.similarity or closed & set(pair) or goes in keepers:
            continue
        merged.append(Merger(site.key, goes, stays, cosine))
        factors[stays] += float(inner[goes, stays] / squares[stays])
        closed.add(goes)
        keepers.add(stays)
    largest = max((cosine for cosine, *_ in pairs), default=0.0)
    return MergerPlan(site, tuple(merged), tuple(dropped), factors, statistics, weight, largest)


def _statistics(
    model: nn.Module, sites: Sequence[Site], samples: Sequence[Sample]
) -> list[Statistics]:
    """Of what each output projection reads, behind the gates."""
    every = [_empty(site) for site in sites]
    with eval_mode(model):
        for sample in samples:
            with _inputs(sites, every, sample.mask_BT):
                model(**sample.inputs)
    return every


def _empty(site: Site) -> Statistics:
    features = site.count * site.width
    return Statistics.empty(features, 0, device_of(site.module))


@contextmanager
def _inputs(sites: Sequence[Site], every: Sequence[Statistics], mask_BT: Tensor) -> Iterator[None]:
    def add(statistics: Statistics, module: nn.Module, args: Any, kwargs: Any) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        statistics.add(without_padding(x, mask_BT))

    with ExitStack() as hooks:
        for site, statistics in zip(sites, every, strict=True):
            hook = partial(add, statistics)
            handle = site.module.register_forward_pre_hook(hook, with_kwargs=True)
            hooks.callback(handle.remove)
        yield


# --- what takes over -----------------------------------------------------------------------------


def _apply(plan: MergerPlan, gates: Gates, own: Compensation | None, config: SleepConfig) -> None:
    site, gate = plan.site, _gate(gates, plan.site)
    if own is None:
        gate.mul_(plan.factors.to(gate))
    else:
        factors = plan.factors.to(plan.weight_OF).repeat_interleave(site.width)
        removal = remove_units(
            plan.statistics,
            len(plan.closed),
            width=site.width,
            damping=config.damping,
            prior_OF=plan.weight_OF * factors,
            order=torch.tensor(plan.closed),
        )
        own.weight("heads", site.key).copy_(removal.weight_OF)
    gate[plan.closed] = 0


def _gate(gates: Gates, site: Site) -> nn.Parameter:
    return gates.pattern()["heads", site.key]


def _free_name(model: nn.Module) -> str:
    name = "compensation"
    while name in attached(model):
        name += "_"
    return name
