"""LoRA that acts on [CPX] positions alone: the prompt's keys and values never depend on it."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pliant.anatomy import Anatomy
from pliant.anatomy.blocks import Projection, projections
from pliant.complexity.config import CPXConfig
from pliant.errors import InvalidInput
from pliant.prefill import device_of

MODELS = "transformers.models."


class Lora(nn.Module):
    """x -> scale * B A x in fp32; initially zero, because B starts at zero."""

    def __init__(self, projection: Projection, rank: int, scale: float, seed: int) -> None:
        super().__init__()
        self.scale = scale
        place = device_of(projection.module)
        generator = torch.Generator().manual_seed(seed)
        a = torch.rand(rank, projection.inputs, generator=generator) * 2 - 1
        self.a = nn.Parameter((a / math.sqrt(projection.inputs)).to(place))
        self.b = nn.Parameter(torch.zeros(projection.outputs, rank, device=place))

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_autocast_enabled(x.device.type):
            return self._change(x)
        with torch.autocast(device_type=x.device.type, enabled=False):
            return self._change(x)

    def _change(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x.to(self.a.dtype), self.a) * self.scale, self.b)


def targets(anatomy: Anatomy, config: CPXConfig) -> Iterator[tuple[str, Projection]]:
    """The projections that take a LoRA, each with its key."""
    depth = len(anatomy.layers) if config.layer is None else config.layer
    chosen = False
    for index, layer in enumerate(list(anatomy.layers)[:depth]):
        for projection in projections(layer):
            if _is_target(projection, config.lora_targets):
                chosen = True
                yield f"{index}_{projection.path.replace('.', '_')}", projection
    if not chosen:
        names = sorted({p.names[0] for layer in anatomy.layers for p in projections(layer)})
        raise InvalidInput(
            f"lora_targets = {config.lora_targets!r} names no projection of the layers: "
            f"there are {', '.join(names) or 'none'}"
        )


def _is_target(projection: Projection, ends: tuple[str, ...]) -> bool:
    if ends:
        return any(f".{projection.path}".endswith(f".{end}") for end in ends)
    # A numbered module in a layer is one expert of many.
    numbered = any(part.isdigit() for part in projection.path.split("."))
    return not numbered and _maps_features(projection)


@torch.no_grad()
def _maps_features(projection: Projection) -> bool:
    """Whether a model's own kind of projection maps features to features: Falcon's does, but
    DeepSeek-V4's works in groups, and Llama 4's router returns a pair."""
    module = projection.module
    weight = next(module.parameters(), None)
    if weight is None or not type(module).__module__.startswith(MODELS):
        return True
    try:
        x = torch.zeros(1, 1, projection.inputs, device=device_of(module), dtype=weight.dtype)
        output = module(x)
    except RuntimeError:
        return False
    return isinstance(output, Tensor) and output.shape == (1, 1, projection.outputs)
