"""Which of the closed heads grow again first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from pliant.anatomy.modes import eval_mode
from pliant.errors import InvalidInput
from pliant.structure.calibration import Batch, Sample, predicted, sequence_losses
from pliant.structure.gates import Gates
from pliant.structure.plasticity.config import Growth
from pliant.structure.ranking.importance import ImportanceConfig, importance
from pliant.structure.units import Site

Head = tuple[str, int]
"""The key of a site, and a number in it."""


def ranked(
    gates: Gates,
    closed: Sequence[Head],
    growth: Growth,
    batches: Sequence[Batch],
    samples: Sequence[Sample],
    seed: int = 0,
) -> list[Head]:
    """The closed heads in the order in which they should grow."""
    if growth == "random":
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(closed), generator=generator).tolist()
        return [closed[i] for i in order]
    if growth == "entropy_gap":
        config = ImportanceConfig(("heads",), "entropy")  # that is 1 - H / log T
        return _highest_first(closed, importance(gates.base, batches, config).units["heads"])
    promise = loss_decreases(gates, samples)
    if growth == "gradient":
        return _highest_first(closed, promise)
    return _balanced(_highest_first(closed, promise), gates)


def loss_decreases(gates: Gates, samples: Sequence[Sample]) -> dict[str, Tensor]:
    """For each site, what opening each gate takes off the mean loss, to first order."""
    own = head_sites(gates)
    parameters = [gates.pattern()["heads", site.key] for site in own]
    sums = [torch.zeros(site.count, dtype=torch.float64) for site in own]
    with ExitStack() as stack:
        stack.enter_context(eval_mode(gates.base))
        stack.enter_context(torch.enable_grad())
        for parameter in parameters:
            stack.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(True)
        for sample in samples:
            loss = sequence_losses(gates.base, sample).sum()
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            for sum_, gradient in zip(sums, gradients, strict=True):
                if gradient is not None:
                    sum_ -= gradient.cpu().double()
    tokens = predicted(samples)
    decreases = {site.key: sum_ / tokens for site, sum_ in zip(own, sums, strict=True)}
    if not all(values.isfinite().all() for values in decreases.values()):
        raise InvalidInput("the gradient of a gate is not finite: the model's numbers overflow")
    return decreases


@torch.no_grad()
def mean_loss(model: nn.Module, samples: Sequence[Sample]) -> float:
    """Of a predicted token, in eval mode."""
    with eval_mode(model):
        total = sum(float(sequence_losses(model, sample).sum()) for sample in samples)
    return total / predicted(samples)


def head_sites(gates: Gates) -> list[Site]:
    return [site for site in gates.sites if site.kind == "heads"]


def _highest_first(closed: Iterable[Head], scores: Mapping[str, Tensor]) -> list[Head]:
    return sorted(closed, key=lambda head: -float(scores[head[0]][head[1]]))


def _balanced(best_first: list[Head], gates: Gates) -> list[Head]:
    """Each time the best head of the layer with the smallest share of open heads."""
    own = {site.key: gates.pattern()["heads", site.key] for site in head_sites(gates)}
    opened = {key: int((gate != 0).sum()) for key, gate in own.items()}
    waiting, order = list(best_first), []
    while waiting:
        # min() returns the first of equals, which is the best of its layer.
        head = min(waiting, key=lambda head: opened[head[0]] / len(own[head[0]]))
        waiting.remove(head)
        opened[head[0]] += 1
        order.append(head)
    return order
