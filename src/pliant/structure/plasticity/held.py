"""Weights that stay where they are while an optimizer updates the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from pliant.adapters import attached
from pliant.anatomy import Anatomy
from pliant.errors import AdapterError, UnsupportedModel
from pliant.structure.pruning.compensation import Compensation
from pliant.structure.units import Site


class Held:
    """Entries of parameters, as they were before an update.

    What only a closed head uses has no gradient at all, in whatever way a model lays out its
    projections; weight decay and momentum would move it all the same.
    """

    def __init__(self) -> None:
        self._restore: list[Callable[[], object]] = []

    def hold_attention(self, anatomy: Anatomy, site: Site, regrown: Sequence[int]) -> None:
        """Hold the attention's entries without gradient, and the output weights of some heads."""
        for parameter in _attention_of(anatomy, site).parameters():
            if parameter.grad is None:
                continue
            held = parameter.grad == 0
            if parameter is getattr(site.module, "weight", None):
                for head in regrown:
                    held.narrow(site.axis, head * site.width, site.width).fill_(True)
            self._hold(parameter, held)

    def hold(self, parameter: nn.Parameter) -> None:
        """Hold the entries without gradient."""
        if parameter.grad is not None:
            self._hold(parameter, parameter.grad == 0)

    def _hold(self, parameter: nn.Parameter, held: Tensor) -> None:
        if hasattr(parameter, "full_tensor"):
            raise UnsupportedModel(
                "the model is sharded: plasticity works where each process has all weights"
            )
        if bool(held.any()):
            values = parameter.detach()[held]
            self._restore.append(partial(parameter.data.masked_scatter_, held, values))

    @torch.no_grad()
    def restore(self) -> None:
        """Put every held entry back, once."""
        for restore in self._restore:
            restore()
        self._restore = []


def _attention_of(anatomy: Anatomy, site: Site) -> nn.Module:
    """The module that holds the attention's projections."""
    layer = anatomy.layers[site.layer]
    path = anatomy.attentions(site.layer)[site.block].output_name
    return layer.get_submodule(path.rpartition(".")[0])


def refuse_compensated_heads(model: nn.Module) -> None:
    for name, adapter in attached(model).items():
        if isinstance(adapter, Compensation) and any(k == "heads" for k, _ in adapter.config.sites):
            raise AdapterError(
                f"{name} has output weights of its own for heads, without those of the closed "
                "ones: detach it before"
            )
