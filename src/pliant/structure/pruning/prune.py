"""Prune a model: choose the units that go, and let those that stay make up for them.

    pruned = prune(model, batches, PruneConfig(channels=0.25))
    pruned.gates          # 0 for what is removed; the base is as it was
    pruned.detach()       # all of it is again in use
    export(model, "smaller")

Layer after layer, on the activations of the already pruned model: the units of a projection are
removed one after the other, each time the one that the others can best do without, and the
projection gets the weights with which they come closest to what the whole model computes there. A
layer that goes altogether is taken over by the projection before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pliant import adapters
from pliant.anatomy import Anatomy
from pliant.anatomy.find import device_of
from pliant.anatomy.lockstep import LayerCall, run_in_lockstep
from pliant.anatomy.modes import eval_mode
from pliant.errors import InvalidInput
from pliant.structure.calibration import Batch, Sample, samples_of
from pliant.structure.config import GateConfig, Kind, Part, PruneConfig, PruneScore
from pliant.structure.gates import Gates, with_first
from pliant.structure.pruning import compensation
from pliant.structure.pruning.allocation import Allocation, Counts, counts_of, statistics_of
from pliant.structure.pruning.close_experts import close_experts
from pliant.structure.pruning.compensation import Compensation, dense_weight
from pliant.structure.pruning.layers import (
    LayerChoice,
    Predecessor,
    block_influences,
    first_of,
    removable,
    run_with_features,
    weight_norm,
)
from pliant.structure.pruning.least_squares import Statistics, remove_units
from pliant.structure.pruning.pruned import Pruned, expert_score
from pliant.structure.ranking.importance import Importance, ImportanceConfig, importance
from pliant.structure.ranking.measures import RANKS
from pliant.structure.units import Site, check_projections, removed_of, sites_of, units_of

LOCAL: tuple[PruneScore, ...] = ("activation", "magnitude", "random")
"""Measured layer after layer, on what is pruned already."""
Report = Callable[[str, int, int], None]
"""What is being done, how many steps of it are done, and of how many."""


@torch.no_grad()
def prune(
    model: nn.Module,
    batches: Sequence[Batch],
    config: PruneConfig,
    *,
    layer_order: Sequence[int] = (),
    scores: Importance | None = None,
    report: Report | None = None,
) -> Pruned:
    """Gate units of `model` off, chosen and compensated for on calibration `batches`.

    The batches are those of `calibration_batches`; the base keeps its weights. If it is known in
    which order layers should go, which takes a while to find out, `layer_order` gives it; `scores`
    that `importance` has measured on the whole model already save measuring them.
    """
    check_score(config.parts, config.score)
    anatomy = Anatomy.of(model)
    samples = samples_of(batches, device_of(anatomy.embeddings))
    if not samples:
        raise InvalidInput("there is no calibration text")
    sites = sites_of(anatomy, config.parts)
    check_projections(sites, "pruning")
    _check_room(sites, config)
    if scores is not None:
        _check_scores(scores, sites, config)
    gates = adapters.attach(model, Gates(model, GateConfig(config.parts)))
    pruned = Pruned(config, gates, None, None, {})
    try:
        if config.experts:
            score = expert_score(config)
            closed = close_experts(model, batches, config.experts, score, seed=config.seed)
            pruned = replace(pruned, experts=closed)
        own = _compensation(anatomy, config)
        pruned = replace(pruned, compensation=own)
        with eval_mode(model):
            scores = scores or _scores(model, batches, config)
            pass_ = _Pass(anatomy, gates, own, config, scores, samples, report)
            pass_.run(layer_order)
    except BaseException:
        pruned.detach()
        raise
    if pruned.experts is not None:
        pass_.removed["experts"] = pruned.experts.removed
    return replace(pruned, removed=pass_.removed, errors=pass_.errors)


def check_score(parts: Sequence[Part], score: PruneScore) -> None:
    """Refuse a score that does not rank units of all these parts."""
    if score == "error" or score in LOCAL:
        return
    for part in parts:
        if part not in RANKS[score]:
            ranked = " and ".join(RANKS[score])
            raise InvalidInput(
                f"score = {score!r} ranks {ranked}, not {part}: prune {ranked} alone, or give "
                "another score"
            )


def _scores(model: nn.Module, batches: Sequence[Batch], config: PruneConfig) -> Importance | None:
    """The importance of every unit, for scores that are measured before any unit goes."""
    if config.score == "error" or config.score in LOCAL:
        return None
    kinds = tuple(part for part in config.parts if part != "experts")
    if not kinds:
        return None
    return importance(model, batches, ImportanceConfig(kinds, config.score, config.seed))


def _compensation(anatomy: Anatomy, config: PruneConfig) -> Compensation | None:
    """New weights for the projections that lose units, or that precede layers that go."""
    kinds: list[Kind] = [part for part in config.parts if part in ("heads", "channels")]
    every = range(len(anatomy.layers))
    if config.layers and "channels" not in kinds and any(anatomy.mlps(i) for i in every):
        kinds.append("channels")
    if not (config.compensate and kinds):
        return None
    return compensation.attach(anatomy.model, sites_of(anatomy, kinds))


class _Pass:
    """One walk through the layers, which prunes each of them before the next one runs."""

    def __init__(
        self,
        anatomy: Anatomy,
        gates: Gates,
        own: Compensation | None,
        config: PruneConfig,
        scores: Importance | None,
        samples: list[Sample],
        report: Report | None,
    ) -> None:
        self.anatomy, self.gates, self.own = anatomy, gates, own
        self.config, self.scores, self.samples = config, scores, samples
        self.report: Report = report or (lambda what, done, total: None)
        self.sites = [site for site in gates.sites if site.kind in ("heads", "channels")]
        self.ends = {} if own is None else own.ends()
        self.counts: Counts = counts_of(self.sites, config)
        self.layers: list[int] = []
        self.last: Predecessor | None = None
        self.removed: dict[str, dict[str, tuple[int, ...]]] = {k: {} for k in config.parts}
        self.errors: dict[str, dict[str, float]] = {k: {} for k in config.parts}

    def run(self, layer_order: Sequence[int]) -> None:
        if self.config.layers:
            count = round(self.config.layers * len(self.anatomy.layers))
            known = len(layer_order) >= count
            self.layers = list(layer_order[:count]) if known else self._choose_layers(count)
            self.removed["layers"] = {str(index): (0,) for index in self.layers}
        if self.sites and not self.config.uniform:
            self.report("comparing layers", 0, 1)
            own = Allocation(self.anatomy, self.sites, self.config, self.samples, self.scores)
            self.counts = own.run(without=self.layers)
        if self.config.needs_text and (self.sites or self.ends):
            run_in_lockstep(self.anatomy, [s.inputs for s in self.samples], self._visit)
            return
        for site in self.sites:
            order = self._order(site, None, dense_weight(site.module).float())
            assert order is not None
            self._close(site, order[: self.counts[site.kind, site.key]])
        for index in self.layers:
            self.gates["layers", index].zero_()

    def _visit(self, index: int, calls: Sequence[LayerCall]) -> Iterable[Any]:
        own = [site for site in self.sites if site.layer == index]
        if index in self.layers:
            for site in own:  # as many as in other layers, no matter which
                self._close(site, torch.arange(self.counts[site.kind, site.key]))
            outputs: Iterable[Any] = self._leave_out(index, calls)
        else:
            for site in own:
                self._prune(site, calls)
            outputs = self._run(index, calls)
        self.report("pruning layers", index + 1, len(self.anatomy.layers))
        return outputs

    # --- whole layers --------------------------------------------------------------------------

    def _choose_layers(self, count: int) -> list[int]:
        """Those that go, in the order of their removal."""
        config, depth = self.config, len(self.anatomy.layers)
        if config.score == "error":
            choice = LayerChoice(self.anatomy, self.gates, self.ends, self.samples, config.damping)
            return choice.choose(count, partial(self.report, "choosing layers"))
        if config.score == "random":
            generator = torch.Generator().manual_seed(config.seed)
            order = torch.randperm(depth, generator=generator).tolist()
            return removable(self.anatomy, order, count)
        if self.scores is not None:
            values = [float(self.scores["layers", index]) for index in range(depth)]
        elif config.score == "magnitude":
            values = [weight_norm(layer) for layer in self.anatomy.layers]
        else:
            values = block_influences(self.anatomy, self.samples)
        order = sorted(range(depth), key=lambda index: values[index])
        return removable(self.anatomy, order, count)

    def _run(self, index: int, calls: Sequence[LayerCall]) -> Iterable[Any]:
        """The layer's outputs; if the next one goes, its projection is to take that over."""
        self.last = None
        if index + 1 not in self.layers or index not in self.ends:
            return (call() for call in calls)
        module, weight = self.ends[index]
        outputs, features = run_with_features(calls, module)
        self.last = Predecessor(weight, calls, features, self.samples)
        return outputs

    def _leave_out(self, index: int, calls: Sequence[LayerCall]) -> list[Any]:
        outputs, hidden = [call() for call in calls], [call.hidden for call in calls]
        if self.last is not None:
            hidden = self.last.take_over([first_of(o) for o in outputs], self.config.damping)
        self.gates["layers", index].zero_()
        return [with_first(o, h.to(first_of(o))) for o, h in zip(outputs, hidden, strict=True)]

    # --- heads and channels --------------------------------------------------------------------

    def _close(self, site: Site, removed: Tensor) -> Tensor:
        each = site.count // units_of(site)
        gate = self.gates[site.kind, site.layer, site.block]
        for unit in removed.tolist():
            gate[unit * each : (unit + 1) * each] = 0
        self.removed[site.kind][site.key] = tuple(removed.tolist())
        return gate

    def _prune(self, site: Site, calls: Sequence[LayerCall]) -> None:
        weight = dense_weight(site.module).float()
        statistics = statistics_of(site, calls, self.samples, weight)
        removal = remove_units(
            statistics,
            self.counts[site.kind, site.key],
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
        if self.scores is not None:
            return (
                self.scores[site.kind, site.layer, site.block].view(units, -1).sum(dim=1).argsort()
            )
        if self.config.score == "random":
            generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + site.layer)
            return torch.randperm(units, generator=generator)
        columns = weight.square().sum(dim=0)
        if self.config.score == "activation":
            assert statistics is not None
            columns = columns * statistics.gram_FF.diagonal()
        return columns.view(units, -1).sum(dim=1).argsort()


def _check_room(sites: Sequence[Site], config: PruneConfig) -> None:
    for site in sites:
        units = len(_of_kind(sites, site.kind)) if site.kind == "layers" else units_of(site)
        share = config.share(site.kind)
        count = round(share * units) if site.kind == "layers" else removed_of(site, share)
        if not 0 < count < units:
            where = "" if site.kind == "layers" else f" in layer {site.layer}"
            raise InvalidInput(
                f"{site.kind} = {share}: of {units} that can go{where} that is {count}; give a "
                "share that removes one at least and keeps one"
            )


def _check_scores(scores: Importance, sites: Sequence[Site], config: PruneConfig) -> None:
    """Refuse what `prune` would not have measured itself, on this model."""
    if scores.score != config.score:
        raise InvalidInput(f"the scores are those by {scores.score}, not by {config.score}")
    if config.score in LOCAL:
        raise InvalidInput(
            f"scores by {config.score} are not those that prune ranks by: it draws or measures its "
            "own, layer after layer. Leave scores out"
        )
    for site in sites:
        if site.kind != "experts":
            count = len(scores[site.kind, site.layer, site.block])
            if count != site.count:
                raise InvalidInput(
                    f"the scores are another model's: of {count} {site.kind} in layer {site.key}, "
                    f"and this model has {site.count}"
                )


def _of_kind(sites: Sequence[Site], kind: Kind) -> list[Site]:
    return [site for site in sites if site.kind == kind]
