"""A model is used for measurements, and restored afterwards."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from pliant.errors import InvalidInput

LATE = 8
"""A running average of the weights covers about the last ninth of the steps."""


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Train mode inside; afterwards modes, gradients, buffers and random state are as before.

    It does not restore weights: see `SavedWeights`.
    """
    modes = {module: module.training for module in model.modules()}
    grads = {p: p.grad for p in model.parameters()}
    buffers = {b: b.detach().to("cpu", copy=True) for b in model.buffers()}
    with same_randomness(model):
        try:
            model.train()
            clear_gradients(model)
            yield
        finally:
            for module, training in modes.items():
                module.training = training
            for p, grad in grads.items():
                p.grad = grad
            for buffer, before in buffers.items():
                if not torch.equal(buffer.cpu(), before):
                    buffer.data.copy_(before)


@contextmanager
def same_randomness(model: nn.Module) -> Iterator[None]:
    """Random numbers of torch, numpy and Python are afterwards as if none was drawn inside."""
    plain, numpys = random.getstate(), np.random.get_state()
    devices = {p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices)):
        try:
            yield
        finally:
            random.setstate(plain)
            np.random.set_state(numpys)


def clear_gradients(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad = None


def trained(model: nn.Module) -> list[nn.Parameter]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise InvalidInput("no parameter of this model is trained: there is nothing to compare")
    return parameters


class SavedWeights:
    """The values of the trained parameters, on the CPU; `restore` may be called repeatedly."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = trained(model)
        self.values: list[Tensor] = [p.detach().to("cpu", copy=True) for p in self.parameters]

    @torch.no_grad()
    def restore(self) -> None:
        for p, value in zip(self.parameters, self.values, strict=True):
            p.copy_(value)


class RunningAverage:
    """A running average of a model's weights over the late steps."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = parameters
        self.values: list[Tensor] = [p.detach().clone() for p in parameters]

    def update(self, step: int) -> None:
        for value, p in zip(self.values, self.parameters, strict=True):
            value.lerp_(p.detach(), (LATE + 1) / (step + 1 + LATE))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the averaged weights inside."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for i, p in enumerate(self.parameters):
            p.data, self.values[i] = self.values[i], p.data
