"""New weights for the projections whose units were removed; the base keeps its own.

The adapter holds a weight for each of some projections and computes with it in their place. So the
units that stay take over what they can of what the others did.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pliant import adapters
from pliant.adapters import Adapter, Around, Wire
from pliant.adapters.hooks import Patch
from pliant.anatomy import Anatomy
from pliant.anatomy.modes import eval_mode
from pliant.errors import InvalidInput, named_settings
from pliant.structure.config import Kind
from pliant.structure.units import Site, check_projections, sites_of


@named_settings
@dataclass(frozen=True)
class CompensationConfig:
    """Which projections get a weight of their own."""

    sites: tuple[tuple[Kind, str], ...] = ()
    """Their kind ("heads" or "channels") and key."""

    def __post_init__(self) -> None:
        sites = tuple((kind, key) for kind, key in self.sites)
        object.__setattr__(self, "sites", sites)
        for kind, key in sites:
            if kind not in ("heads", "channels"):
                raise InvalidInput(f"{kind} end in no projection: compensate heads or channels")
            if not isinstance(key, str):
                raise InvalidInput(f"sites: the key of {kind} is a text, not {key!r}")


class Compensation(Adapter):
    """Weights in place of the base's, until it is detached or exported."""

    part = "structure"
    config_class = CompensationConfig

    def __init__(self, model: nn.Module, config: CompensationConfig) -> None:
        super().__init__(model, config)
        self.weights = nn.ParameterDict(
            {
                f"{site.kind}_{site.key}": nn.Parameter(dense_weight(site.module), False)
                for site in _sites(Anatomy.of(model), config)
            }
        )

    def wire(self, model: nn.Module) -> Iterator[Wire]:
        for site in self.sites:
            yield Around(site.module, partial(self._project, f"{site.kind}_{site.key}"))

    @property
    def sites(self) -> list[Site]:
        """The projections that it has weights for; needs the model that it is attached to."""
        return _sites(self.anatomy, self.config)

    def weight(self, kind: Kind, key: str) -> nn.Parameter:
        """(outputs, inputs), whatever the axis of the base's own weight."""
        return self.weights[f"{kind}_{key}"]

    def ends(self) -> dict[int, tuple[nn.Module, nn.Parameter]]:
        """For each layer the projection that ends its MLP, and its weights here.

        Without those that several layers share.
        """
        anatomy = self.anatomy
        every = range(len(anatomy.layers))
        uses = Counter(id(mlp.down) for i in every for mlp in anatomy.mlps(i))
        return {
            site.layer: (site.module, self.weight(site.kind, site.key))
            for site in self.sites
            if site.kind == "channels" and uses[id(site.module)] == 1
        }

    def _project(self, name: str, forward: Any, x: Tensor) -> Tensor:
        module = forward.module if isinstance(forward, Patch) else forward.__self__
        return F.linear(x, self.weights[name].to(x.dtype), bias_of(module))


def attach(model: nn.Module, sites: Any, name: str = "compensation") -> Compensation:
    """Weights for these sites, equal to the base's so far."""
    config = CompensationConfig(tuple((site.kind, site.key) for site in sites))
    return adapters.attach(model, Compensation(model, config), name)


def _sites(anatomy: Anatomy, config: CompensationConfig) -> list[Site]:
    kinds = list(dict.fromkeys(kind for kind, _ in config.sites))
    own = {(site.kind, site.key): site for site in sites_of(anatomy, kinds)}
    check_projections(own.values(), "compensation")
    missing = [at for at in config.sites if at not in own]
    if missing:
        raise InvalidInput(f"the model has no {missing[0][0]} {missing[0][1]!r} to compensate")
    return [own[at] for at in config.sites]


def bias_of(module: nn.Module) -> Tensor | None:
    bias = getattr(_inner(module), "bias", None)
    return bias if isinstance(bias, Tensor) else None


@torch.no_grad()
def dense_weight(module: nn.Module) -> Tensor:
    """(outputs, inputs) what a projection multiplies by, also if it is quantised or has a LoRA."""
    inner: Any = _inner(module)
    weight = module._parameters.get("weight")  # a LoRA layer's attribute is its base's
    if type(weight) is nn.Parameter and weight.dim() == 2 and weight.is_floating_point():
        transposed = not hasattr(module, "in_features")  # GPT-2's Conv1D
        return (weight.T if transposed else weight).detach().clone()
    inputs = getattr(inner, "in_features", None) or inner.nx
    reference = next(p for p in module.parameters() if p.is_floating_point() or p.numel())
    dtype = reference.dtype if reference.is_floating_point() else torch.float32
    eye = torch.eye(inputs, dtype=dtype, device=reference.device)
    with eval_mode(module):  # without dropout, and without the hooks of gates
        zero = module.forward(torch.zeros_like(eye[:1]))
        return (module.forward(eye) - zero).T.contiguous()


def _inner(module: nn.Module) -> nn.Module:
    while isinstance(wrapped := getattr(module, "base_layer", None), nn.Module):
        module = wrapped
    return module
