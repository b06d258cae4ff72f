"""A model with experts of random z, for timings: what runs does not depend on the values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import get_peft_model
from torch import nn

from pliant.experts import SVFConfig
from pliant.experts.model import svf_layers


def with_random_experts(
    base: nn.Module, names: Sequence[str], spread: float, **settings: Any
) -> Any:
    """The base with one expert for each name, frozen; z - 1 has the standard deviation `spread`.

    `settings` are those of `SVFConfig`.
    """
    first, *others = names
    model = get_peft_model(base, SVFConfig(**settings), adapter_name=first)
    for name in others:
        model.add_adapter(name, SVFConfig(**settings))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, layer in svf_layers(model):
            for change in layer.changes().values():
                change.copy_(spread * torch.randn(change.shape, generator=generator))
    return model.requires_grad_(False).eval()
