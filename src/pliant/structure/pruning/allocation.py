"""How many units each layer loses: the same share everywhere, or more where less is lost.

    counts = counts_of(sites, config)                                   # uniform
    counts = Allocation(anatomy, sites, config, samples, scores).run()  # by what removal costs

What a unit costs must be comparable between layers. The squared error that its removal leaves in a
projection's output is not: some layers' outputs matter more. It is multiplied by the mean square of
the loss's gradient at that output (a Fisher approximation of the loss that the error costs).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from pliant.anatomy import Anatomy
from pliant.anatomy.lockstep import LayerCall, run_in_lockstep
from pliant.errors import InvalidInput
from pliant.structure.calibration import Sample, inputs_of, sequence_losses, without_padding
from pliant.structure.config import Kind, PruneConfig
from pliant.structure.pruning.compensation import dense_weight
from pliant.structure.pruning.least_squares import Statistics, remove_units
from pliant.structure.ranking.importance import Importance
from pliant.structure.units import MULTIPLE, Site, removed_of, units_of

Counts = Mapping[tuple[Kind, str], int]
"""How many units go, by kind and site."""
MOST_OF_THE_REST = 0.6
"""A layer loses at most its uniform share and this much of what that would leave: the costs are
measured on the whole model, and tell little about a layer that is nearly gone."""


def counts_of(sites: Iterable[Site], config: PruneConfig) -> Counts:
    """The same share of every site."""
    return {(s.kind, s.key): removed_of(s, config.share(s.kind)) for s in sites}


class Allocation:
    """Divides as many units as a uniform pruning removes among the layers that stay."""

    def __init__(
        self,
        anatomy: Anatomy,
        sites: Sequence[Site],
        config: PruneConfig,
        samples: Sequence[Sample],
        scores: Importance | None,
    ) -> None:
        self.anatomy, self.sites, self.config = anatomy, sites, config
        self.samples, self.scores = samples, scores

    def run(self, without: Collection[int] = ()) -> Counts:
        """The counts, if these layers go altogether."""
        uniform = counts_of(self.sites, self.config)
        own = [site for site in self.sites if site.layer not in without]
        costs = self._costs(own)
        counts = dict(uniform)
        for kind in {site.kind for site in own}:
            counts |= _cheapest([site for site in own if site.kind == kind], costs, uniform)
        return counts

    def _costs(self, sites: Sequence[Site]) -> dict[tuple[Kind, str], Tensor]:
        """For each site what its units cost, in the order in which they go."""
        if self.config.score in ("error", "activation"):
            return self._costs_of_errors(sites)
        return {(site.kind, site.key): self._scored(site).sort().values for site in sites}

    def _scored(self, site: Site) -> Tensor:
        units = units_of(site)
        if self.scores is not None:
            return self.scores[site.kind, site.layer, site.block].view(units, -1).sum(dim=1)
        if self.config.score == "random":
            seed = self.config.seed * 1_000_003 + site.layer
            return torch.rand(units, generator=torch.Generator().manual_seed(seed))
        columns = dense_weight(site.module).float().square().sum(dim=0)
        return (columns / columns.sum()).view(units, -1).sum(dim=1)

    def _costs_of_errors(self, sites: Sequence[Site]) -> dict[tuple[Kind, str], Tensor]:
        sensitivities = output_sensitivities(self.anatomy.model, sites, self.samples)
        costs: dict[tuple[Kind, str], Tensor] = {}

        def visit(index: int, calls: Sequence[LayerCall]) -> Iterable[Any]:
            for site in sites:
                if site.layer == index:
                    weight = dense_weight(site.module).float()
                    statistics = statistics_of(site, calls, self.samples, weight)
                    errors = self._errors(site, statistics, weight) / statistics.tokens
                    costs[site.kind, site.key] = errors.cpu() * sensitivities[site.kind, site.key]
            return (call() for call in calls)

        run_in_lockstep(self.anatomy, [s.inputs for s in self.samples], visit)
        return costs

    def _errors(self, site: Site, statistics: Statistics, weight: Tensor) -> Tensor:
        """The squared error that each unit adds, from the first to go to the last that may."""
        units = units_of(site)
        if self.config.score == "activation":
            columns = weight.square().sum(dim=0) * statistics.gram_FF.diagonal()
            return columns.view(units, -1).sum(dim=1).sort().values
        return remove_units(
            statistics,
            most_of(site, removed_of(site, self.config.share(site.kind))),
            width=site.width * (site.count // units),
            damping=self.config.damping,
            prior_OF=weight,
        ).costs


def most_of(site: Site, uniform: int) -> int:
    """How many units a site may lose, if so many are its uniform share."""
    units = units_of(site)
    return min(units - 1, math.ceil(uniform + MOST_OF_THE_REST * (units - uniform)))


def _cheapest(
    sites: Sequence[Site], costs: Mapping[tuple[Kind, str], Tensor], uniform: Counts
) -> Counts:
    """The cheapest units of all these sites, as many features as a uniform pruning removes."""
    steps: list[tuple[float, int, tuple[Kind, str]]] = []
    for site in sites:
        at = (site.kind, site.key)
        own = costs[at][: most_of(site, uniform[at])].split(_step_sizes(site, uniform[at]))
        dearest = 0.0
        for units in own:  # a unit goes only after those before it
            dearest = max(dearest, float(units.mean()) / _features(site))
            steps.append((dearest, len(units), at))
    width = {(site.kind, site.key): _features(site) for site in sites}
    left = sum(uniform[at] * each for at, each in width.items())
    counts: dict[tuple[Kind, str], int] = defaultdict(int, dict.fromkeys(width, 0))
    for _, units, at in sorted(steps, key=lambda step: step[0]):
        if left >= units * width[at]:
            counts[at] += units
            left -= units * width[at]
    return dict(counts)


def _step_sizes(site: Site, uniform: int) -> list[int]:
    """Of many channels a multiple of 8 stays, as in a uniform pruning."""
    most = most_of(site, uniform)
    if site.kind != "channels" or site.count - uniform <= MULTIPLE**2:
        return [1] * most
    first = site.count % MULTIPLE or MULTIPLE
    whole = (most - first) // MULTIPLE
    rest = most - first - whole * MULTIPLE
    return [first, *[MULTIPLE] * whole, *([rest] if rest else [])]


def _features(site: Site) -> int:
    return site.width * (site.count // units_of(site))


# --- measures ------------------------------------------------------------------------------------


def statistics_of(
    site: Site, calls: Sequence[LayerCall], samples: Sequence[Sample], weight: Tensor
) -> Statistics:
    """Of what the projection sees; it should give what the whole weight makes of it."""
    outputs, inputs = weight.shape
    statistics = Statistics.empty(inputs, outputs, weight.device)
    for call, sample in zip(calls, samples, strict=True):
        with inputs_of(site.module) as seen:
            call()
        for x in seen:
            statistics.add(without_padding(x, sample.mask_BT))
    if not statistics.tokens:
        raise InvalidInput(f"layer {site.layer}: its {site.kind} did not run")
    statistics.cross_OF = weight @ statistics.gram_FF
    return statistics


def output_sensitivities(
    model: nn.Module, sites: Sequence[Site], samples: Sequence[Sample]
) -> dict[tuple[Kind, str], float]:
    """The mean square of the loss's gradient at each site's output: of a token, and a feature."""
    squares: dict[tuple[Kind, str], float] = defaultdict(float)
    numbers: dict[tuple[Kind, str], int] = defaultdict(int)
    seen: list[tuple[tuple[Kind, str], Tensor]] = []
    with ExitStack() as stack:
        for site in sites:
            handle = site.module.register_forward_hook(_note(seen, (site.kind, site.key)))
            stack.callback(handle.remove)
        for sample in samples:
            seen.clear()
            with torch.enable_grad():
                loss = sequence_losses(model, sample).sum()
            outputs = [output for _, output in seen]
            gradients = torch.autograd.grad(loss, outputs, allow_unused=True)
            for (at, output), gradient in zip(seen, gradients, strict=True):
                numbers[at] += output.numel()
                squares[at] += 0.0 if gradient is None else float(gradient.float().square().sum())
    return {at: squares[at] / number for at, number in numbers.items()}


def _note(seen: list[tuple[tuple[Kind, str], Tensor]], at: tuple[Kind, str]) -> Any:
    """A hook that keeps a module's output, with a gradient even if nothing before it has one."""

    def note(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        own = output if output.requires_grad else output.detach().requires_grad_()
        seen.append((at, own))
        return own.clone()  # which the model may edit in place

    return note
