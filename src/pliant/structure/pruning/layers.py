"""Whole layers: what the layer before can take over of one that goes, and which can best go.

A layer adds an update to the hidden states. The projection that ends the layer before it reads the
features of that layer's MLP, and a linear map of these comes close to the update. Added to the
projection's weights, it takes the place of the layer that goes, and costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pliant.anatomy import Anatomy
from pliant.anatomy.decoder import run_decoder
from pliant.anatomy.lockstep import LayerCall, run_in_lockstep
from pliant.structure.calibration import (
    Sample,
    inputs_of,
    predicted,
    sequence_losses,
    without_padding,
)
from pliant.structure.gates import Gates, with_first
from pliant.structure.pruning.least_squares import Statistics, solve
from pliant.structure.ranking.measures import Progress
from pliant.structure.ranking.meters import InfluenceMeter
from pliant.structure.stock.smaller import has_stock_form_without
from pliant.structure.units import sites_of

TRIAL_TOKENS = 2048
"""Tokens on which the removal of each layer is tried out."""
ROUNDS = 3
"""In which layers are chosen; what is left after each is measured anew."""


@dataclass(eq=False)
class Predecessor:
    """The layer before others that go, and the projection that ends it."""

    weight: Tensor
    """(outputs, inputs) what the projection computes with."""
    calls: Sequence[LayerCall]
    features: Sequence[Tensor]
    """Its inputs, a tensor for each call."""
    samples: Sequence[Sample]

    def take_over(self, wanted: Sequence[Tensor], damping: float) -> list[Tensor]:
        """Change the weights so that the layer's outputs come closest to those `wanted`, and return
        the outputs.

        In some models a norm follows the projection, and what is added to its weights is not added
        to the outputs: the change stays only if it brings them closer.
        """
        before, old = self._outputs(), self.weight.clone()
        self.weight.add_(self.change(before, wanted, damping))
        after = self._outputs()
        if self._error(after, wanted) < self._error(before, wanted):
            return after
        self.weight.copy_(old)
        return before

    def change(self, before: Sequence[Tensor], wanted: Sequence[Tensor], damping: float) -> Tensor:
        """(outputs, inputs) what is to be added to the weights.

        Each token's error counts relative to its state, as the norms of later layers see it.
        """
        outputs, inputs = self.weight.shape
        statistics = Statistics.empty(inputs, outputs, self.weight.device)
        for x, sample, h, aim in zip(self.features, self.samples, before, wanted, strict=True):
            x, h, aim = (without_padding(own, sample.mask_BT).float() for own in (x, h, aim))
            if len(x) != len(h):  # Gemma 3n has several states for each token
                return torch.zeros_like(self.weight)
            scale = aim.norm(dim=-1, keepdim=True).clamp(min=1e-12)
            statistics.add(x / scale, (aim - h) / scale)
        return solve(statistics, damping).to(self.weight)

    def _outputs(self) -> list[Tensor]:
        return [first_of(call()) for call in self.calls]

    def _error(self, outputs: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
        """The squared error of each token's state, relative to the state, summed over all."""
        total = 0.0
        for h, aim, sample in zip(outputs, wanted, self.samples, strict=True):
            aim = without_padding(aim, sample.mask_BT).float()
            error = without_padding(h, sample.mask_BT).float() - aim
            total += float((error.square().sum(-1) / aim.square().sum(-1).clamp(min=1e-30)).sum())
        return total


def run_with_features(
    calls: Sequence[LayerCall], projection: nn.Module | None
) -> tuple[list[Any], list[Tensor]]:
    """Each call's output, and what the projection read."""
    if projection is None:
        return [call() for call in calls], []
    with inputs_of(projection) as features:
        return [call() for call in calls], features


def first_of(output: Any) -> Tensor:
    """The hidden states among what a layer returns."""
    hidden: Tensor = output if isinstance(output, Tensor) else output[0]
    return hidden


# --- simple scores -------------------------------------------------------------------------------


def block_influences(anatomy: Anatomy, samples: Sequence[Sample]) -> list[float]:
    """One minus the mean cosine of each layer's input and output (ShortGPT)."""
    meters = [InfluenceMeter(site) for site in sites_of(anatomy, ["layers"])]
    with ExitStack() as stack:
        for meter in meters:
            for handle in meter.connect(meter.site.module):
                stack.callback(handle.remove)
        for sample in samples:
            for meter in meters:
                meter.mask_BT = sample.mask_BT
            run_decoder(anatomy, sample.inputs)
    return [float(meter.value()) for meter in meters]


def weight_norm(layer: nn.Module) -> float:
    return sum(float(p.detach().float().square().sum()) for p in layer.parameters()) ** 0.5


# --- which layers go -----------------------------------------------------------------------------


def removable(
    anatomy: Anatomy, ranked: Sequence[int], count: int, chosen: Sequence[int] = ()
) -> list[int]:
    """`chosen` and the first of the `ranked` layers, so many together, without which a stock model
    remains; in a Jamba the layers' kinds follow from their places.

    Where the stock model allows no such choice, the first of all.
    """
    taken, rest = list(chosen), [layer for layer in ranked if layer not in chosen]
    while len(taken) < count:
        fitting = (i for i in rest if has_stock_form_without(anatomy.model, {*taken, i}))
        if (layer := next(fitting, None)) is None:
            return [*chosen, *(i for i in ranked if i not in chosen)][:count]
        taken.append(layer)
        rest.remove(layer)
    return taken


@dataclass(eq=False)
class LayerChoice:
    """Chooses layers by the loss without each of them, after the one before has taken over."""

    anatomy: Anatomy
    gates: Gates
    """With a gate for each layer."""
    weights: Mapping[int, tuple[nn.Module, Tensor]]
    """For each layer the projection that ends it, and its weights; none without compensation."""
    samples: Sequence[Sample]
    damping: float

    def choose(self, count: int, progress: Progress | None = None) -> list[int]:
        """The layers in the order of their removal; weights and gates are as before."""
        chosen: list[int] = []
        rounds = min(ROUNDS, count)
        trial = _spread(self.samples, TRIAL_TOKENS)
        done, total = 0, rounds * len(self.anatomy.layers)
        with self._restored():
            for i in range(rounds):
                changes = self._changes(chosen)
                losses = {}
                for layer in range(len(self.anatomy.layers)):
                    done += 1
                    if layer not in chosen:
                        with self._without(layer, changes.get(layer)):
                            losses[layer] = _loss(self.anatomy.model, trial)
                    if progress is not None:
                        progress(done, total)
                ranked = sorted(losses, key=lambda layer: losses[layer])
                more = (count - len(chosen)) // (rounds - i)
                chosen = removable(self.anatomy, ranked, len(chosen) + more, chosen)
        return chosen

    def _changes(self, chosen: Sequence[int]) -> dict[int, tuple[Tensor, Tensor]]:
        """For each other layer: the weights before it, and what to add to them if it goes.

        On the way the weights take over the layers that are chosen already.
        """
        changes: dict[int, tuple[Tensor, Tensor]] = {}
        last: Predecessor | None = None

        def visit(index: int, calls: Sequence[LayerCall]) -> Sequence[Any]:
            nonlocal last
            own = self.weights.get(index)
            outputs, features = run_with_features(calls, own[0] if own else None)
            hidden, wanted = [call.hidden for call in calls], [first_of(o) for o in outputs]
            if index in chosen:
                after = hidden if last is None else last.take_over(wanted, self.damping)
                return [with_first(o, h) for o, h in zip(outputs, after, strict=True)]
            if last is not None:
                change = last.change(hidden, wanted, self.damping)
                changes[index] = (last.weight, change.cpu())
            last = None if own is None else Predecessor(own[1], calls, features, self.samples)
            return outputs

        run_in_lockstep(self.anatomy, [sample.inputs for sample in self.samples], visit)
        for index in chosen:
            self.gates["layers", index].zero_()
        return changes

    @contextmanager
    def _without(self, layer: int, change: tuple[Tensor, Tensor] | None) -> Iterator[None]:
        """One more layer is left out inside the block."""
        gate = self.gates["layers", layer]
        gate.zero_()
        weight, added = change or (gate, torch.zeros(()))
        old = weight.clone()
        weight.add_(added.to(weight))
        try:
            yield
        finally:
            weight.copy_(old)
            gate.fill_(1)

    @contextmanager
    def _restored(self) -> Iterator[None]:
        """Weights are as before after the block, and all layers' gates at 1."""
        old = {index: weight.clone() for index, (_, weight) in self.weights.items()}
        try:
            yield
        finally:
            for index, (_, weight) in self.weights.items():
                weight.copy_(old[index])
            for index in range(len(self.anatomy.layers)):
                self.gates["layers", index].fill_(1)


def _spread(samples: Sequence[Sample], tokens: int) -> list[Sample]:
    """Single sequences, one of each batch in turn, that hold about so many tokens."""
    columns = [sample.sequences() for sample in samples]
    longest = max(map(len, columns))
    turns = [own[i] for i in range(longest) for own in columns if i < len(own)]
    chosen: list[Sample] = []
    for sequence in turns:
        if chosen and predicted(chosen) >= tokens:
            break
        chosen.append(sequence)
    return chosen


def _loss(model: nn.Module, samples: Sequence[Sample]) -> float:
    total = sum(float(sequence_losses(model, sample).sum()) for sample in samples)
    return total / predicted(samples)
