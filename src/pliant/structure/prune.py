"""Prune a model: choose the units that go, and let those that stay make up for them.

    pruned = prune(model, batches, PruneConfig(channels=0.25))
    pruned.gates          # 0 for what is removed; the base is as it was
    pruned.detach()       # all of it is again in use
    export(model, "smaller")

Layer after layer, on the activations of the already pruned model: the units of a projection are
removed one after the other, each time the one that the others can best do without, and the
projection gets the weights with which they come closest to what the whole model computes there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from pliant import adapters
from pliant.anatomy import Anatomy
from pliant.anatomy.find import device_of
from pliant.anatomy.lockstep import LayerCall, run_in_lockstep
from pliant.anatomy.modes import eval_mode
from pliant.errors import InvalidInput, check_choice, check_whole
from pliant.structure import compensation
from pliant.structure.calibration import (
    Batch,
    Sample,
    predicted,
    samples_of,
    sequence_losses,
    without_padding,
)
from pliant.structure.compensation import Compensation, dense_weight
from pliant.structure.config import GateConfig, Kind
from pliant.structure.gates import Gates
from pliant.structure.least_squares import Statistics, remove_units
from pliant.structure.smaller import units_of
from pliant.structure.units import Site, sites_of

MULTIPLE = 8
"""Matrix kernels prefer such widths."""
Score = Literal["error", "activation", "magnitude", "random"]
Report = Callable[[str, int, int], None]
"""What is being done, how many steps of it are done, and of how many."""


@dataclass(frozen=True)
class PruneConfig:
    """How much of each part goes; uniform over the layers, as a stock checkpoint needs."""

    heads: float = 0.0
    """The share of attention heads, in groups that share a KV head."""
    channels: float = 0.0
    """The share of the MLP's channels."""
    score: Score = "error"
    """Which units go first: those whose loss the others can best make up for ("error"), those with
    the smallest activation times weight, those with the smallest weight, or any."""
    compensate: bool = True
    """Give the projections new weights; without, the others stay as they are."""
    damping: float = 0.01
    """How strongly the new weights are drawn to the old ones, relative to the features."""
    seed: int = 0
    """Of the score "random"."""

    def __post_init__(self) -> None:
        for name in ("heads", "channels"):
            share = getattr(self, name)
            if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share < 1:
                raise InvalidInput(f"{name} = {share!r}: give a share from 0 to below 1")
        check_choice("score", self.score, get_args(Score))
        check_whole("seed", self.seed, least=0)
        if not (self.heads or self.channels):
            raise InvalidInput("nothing to prune: give a share of heads or channels")
        if not self.damping > 0:
            raise InvalidInput(f"damping = {self.damping!r}: give a number above 0")

    @property
    def needs_text(self) -> bool:
        """Whether the choice of units or the new weights depend on the calibration text."""
        return self.compensate or self.score in ("error", "activation")

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """In the order in which a layer runs them."""
        kinds: tuple[Kind, ...] = ("heads", "channels")
        return tuple(kind for kind in kinds if getattr(self, kind))


@dataclass(frozen=True, eq=False)
class Pruned:
    """The adapters that prune a model, and what was measured on the way."""

    config: PruneConfig
    gates: Gates
    compensation: Compensation | None
    removed: dict[str, dict[str, tuple[int, ...]]]
    """Units by kind and site, in the order of removal."""
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    """For each projection the squared error of its output on the calibration text, relative to the
    output; with compensation as the text was fitted, so it is a little too good."""

    def detach(self) -> None:
        if self.compensation is not None:
            self.compensation.detach()
        self.gates.detach()

    def as_dict(self) -> dict[str, Any]:
        removed = {k: {s: list(u) for s, u in sites.items()} for k, sites in self.removed.items()}
        return {"removed": removed, "errors": self.errors, "config": asdict(self.config)}

    def __str__(self) -> str:
        parts = [
            f"{sum(map(len, sites.values())):,} {kind}" for kind, sites in self.removed.items()
        ]
        how = "compensated" if self.compensation is not None else "not compensated"
        return f"{' and '.join(parts)} pruned, {how}"


@torch.no_grad()
def prune(
    model: nn.Module,
    batches: Sequence[Batch],
    config: PruneConfig,
    *,
    report: Report | None = None,
) -> Pruned:
    """Gate units of `model` off, chosen and compensated for on calibration `batches`.

    The batches are those of `calibration_batches`; the base keeps its weights.
    """
    anatomy = Anatomy.of(model)
    samples = samples_of(batches, device_of(anatomy.embeddings))
    if not samples:
        raise InvalidInput("there is no calibration text")
    sites = sites_of(anatomy, config.kinds)
    _check_room(sites, config)
    gates = adapters.attach(model, Gates(model, GateConfig(config.kinds)))
    own = None
    try:
        own = compensation.attach(model, sites) if config.compensate else None
        pass_ = _Pass(anatomy, gates, own, config, report, samples)
        if config.needs_text:
            with eval_mode(model):
                run_in_lockstep(anatomy, [sample.inputs for sample in samples], pass_.visit)
        else:
            pass_.close_gates()
    except BaseException:
        Pruned(config, gates, own, {}).detach()
        raise
    return Pruned(config, gates, own, pass_.removed, pass_.errors)


class _Pass:
    """One walk through the layers, which prunes each of them before the next one runs."""

    def __init__(
        self,
        anatomy: Anatomy,
        gates: Gates,
        own: Compensation | None,
        config: PruneConfig,
        report: Report | None,
        samples: list[Sample],
    ) -> None:
        self.anatomy, self.gates, self.own = anatomy, gates, own
        self.config, self.report, self.samples = config, report, samples
        self.sites = gates.sites
        self.removed: dict[str, dict[str, tuple[int, ...]]] = {k: {} for k in config.kinds}
        self.errors: dict[str, dict[str, float]] = {k: {} for k in config.kinds}

    def visit(self, index: int, calls: Sequence[LayerCall]) -> Iterator[Any]:
        for kind in self.config.kinds:
            for site in self.sites:
                if site.layer == index and site.kind == kind:
                    self._prune(site, calls)
        if self.report is not None:
            self.report("pruning layers", index + 1, len(self.anatomy.layers))
        for call in calls:
            yield call()

    def close_gates(self) -> None:
        """Close those that come first whatever the text is."""
        for site in self.sites:
            weight = dense_weight(site.module).float()
            order = self._order(site, None, weight)
            assert order is not None
            self._close(site, order[: removed_of(site, getattr(self.config, site.kind))])

    def _close(self, site: Site, removed: Tensor) -> Tensor:
        each = site.count // units_of(site)
        gate = self.gates[site.kind, site.layer, site.block]
        for unit in removed.tolist():
            gate[unit * each : (unit + 1) * each] = 0
        self.removed[site.kind][site.key] = tuple(removed.tolist())
        return gate

    def _prune(self, site: Site, calls: Sequence[LayerCall]) -> None:
        weight = dense_weight(site.module).float()
        statistics = self._statistics(site, calls, weight)
        removal = remove_units(
            statistics,
            removed_of(site, getattr(self.config, site.kind)),
            width=site.width * (site.count // units_of(site)),
            damping=self.config.damping,
            prior_OF=weight,
            order=self._order(site, statistics, weight),
        )
        gate = self._close(site, removal.removed)
        new = removal.weight_OF
        if self.own is None:
            new = weight * gate.repeat_interleave(site.width)
        else:
            self.own.weight(site.kind, site.key).copy_(new)
        self.errors[site.kind][site.key] = statistics.error(new, weight)

    def _order(self, site: Site, statistics: Statistics | None, weight: Tensor) -> Tensor | None:
        """The units from the least important to the most; None for "error", which finds it."""
        units = units_of(site)
        if self.config.score == "error":
            return None
        if self.config.score == "random":
            generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + site.layer)
            return torch.randperm(units, generator=generator)
        columns = weight.square().sum(dim=0)
        if self.config.score == "activation":
            assert statistics is not None
            columns = columns * statistics.gram_FF.diagonal()
        return columns.view(units, -1).sum(dim=1).argsort()

    def _statistics(self, site: Site, calls: Sequence[LayerCall], weight: Tensor) -> Statistics:
        """Of what the projection sees; it should give what the whole weight makes of it."""
        outputs, inputs = weight.shape
        statistics = Statistics.empty(inputs, outputs, weight.device)
        for call, sample in zip(calls, self.samples, strict=True):
            with _inputs_of(site.module) as seen:
                call()
            for x in seen:
                statistics.add(without_padding(x, sample.mask_BT))
        if not statistics.tokens:
            raise InvalidInput(f"layer {site.layer}: its {site.kind} did not run")
        statistics.cross_OF = weight @ statistics.gram_FF
        return statistics


def removed_of(site: Site, share: float) -> int:
    """How many units of the site a share is; of many channels a multiple of 8 stays."""
    units = units_of(site)
    remaining = units - round(share * units)
    if site.kind == "channels" and remaining > MULTIPLE**2:
        remaining = round(remaining / MULTIPLE) * MULTIPLE
    return units - remaining


@torch.no_grad()
def perplexity(model: nn.Module, batches: Sequence[Batch]) -> float:
    """Of the batches' labels, or of every token after the first."""
    samples = samples_of(batches, device_of(model))
    with eval_mode(model):
        losses = sum(float(sequence_losses(model, sample).sum()) for sample in samples)
    return math.exp(min(losses / predicted(samples), 700.0))


@contextmanager
def _inputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    seen: list[Tensor] = []

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args or tuple(kwargs.values()))[0])

    handle = module.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def _check_room(sites: Sequence[Site], config: PruneConfig) -> None:
    for site in sites:
        share = getattr(config, site.kind)
        count = removed_of(site, share)
        if not 0 < count < units_of(site):
            raise InvalidInput(
                f"{site.kind} = {share}: of {units_of(site)} that can go in layer {site.layer} "
                f"that is {count}; give a share that removes one at least and keeps one"
            )
