"""What each projection of a layer is for: attention, the MLP, a mixture of experts, or another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import nn

from pliant.anatomy.anatomy import Anatomy
from pliant.anatomy.blocks import (
    Mixture,
    Projection,
    below,
    mixture_paths,
    projections,
    widens,
)

Role = Literal["attention", "mlp", "expert", "router", "other"]
"""`other` is what mixes tokens without attention: state spaces, convolutions, RWKV."""

ROUTER_NAMES = ("router", "gate", "classifier")


@dataclass(frozen=True)
class Matrix:
    """A weight of a layer: a projection's, or one of the stacked weights of a mixture."""

    path: str
    """Of the module, in the model."""
    module: nn.Module
    parameter: str
    """`weight`, or the name of the stacked parameter."""
    role: Role

    @property
    def is_stacked(self) -> bool:
        return self.role == "expert" and self.parameter != "weight"


def matrices(anatomy: Anatomy) -> Iterator[Matrix]:
    """Every projection and stacked weight of the layers, in order; a shared module once."""
    paths = {id(module): path for path, module in anatomy.model.named_modules()}
    seen: set[int] = set()
    for index, layer in enumerate(anatomy.layers):
        prefix = paths[id(layer)]
        for projection, role in _roles(anatomy, index):
            if id(projection.module) not in seen:
                seen.add(id(projection.module))
                path = f"{prefix}.{projection.path}"
                yield Matrix(path, projection.module, "weight", role)
        for mixture in anatomy.mixtures(index):
            path = f"{prefix}.{mixture.experts_name}".replace(".base_layer", "")
            for name, parameter in _own(mixture).named_parameters(recurse=False):
                if parameter.dim() == 3:
                    yield Matrix(path, mixture.experts, name, "expert")


def _own(mixture: Mixture) -> nn.Module:
    """The module that holds the stacked weights, inside PEFT's layers."""
    module = mixture.experts
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module


def _roles(anatomy: Anatomy, index: int) -> Iterator[tuple[Projection, Role]]:
    layer = anatomy.layers[index]
    every = list(projections(layer))
    downs = {mlp.down_name for mlp in anatomy.mlps(index)}
    narrowing = [p for p in every if p.path in downs]
    mixtures = anatomy.mixtures(index)
    routed = list(mixture_paths(layer))
    blocks = _attention_blocks(anatomy, index)
    for projection in every:
        path = projection.path
        if path in downs or any(widens(projection, down) for down in narrowing):
            yield projection, "mlp"
        elif below(path, routed):
            is_router = projection.names[0] in ROUTER_NAMES or any(
                projection.outputs == mixture.count for mixture in mixtures
            )
            yield projection, "router" if is_router else "expert"
        elif below(path, blocks) or ("" in blocks and "." not in path):
            yield projection, "attention"
        else:
            yield projection, "other"


def _attention_blocks(anatomy: Anatomy, index: int) -> list[str]:
    """The top-most module below the layer that holds an attention; "" if that is the layer."""
    names = [attention.output_name for attention in anatomy.attentions(index)]
    return [name.split(".")[0] if "." in name else "" for name in names]
