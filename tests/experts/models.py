"""Models and experts for these tests."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel, get_peft_model
from tests.minimal_adapter import tiny_llama

from pliant.experts import SVFConfig
from pliant.experts.model import svf_layers

IDS = torch.randint(5, 60, (3, 9), generator=torch.Generator().manual_seed(0))


def with_experts(*names: str, model: Any = None, **options: Any) -> PeftModel:
    """A tiny model with experts of these names, each with its own z; the first is active."""
    base = model if model is not None else tiny_llama().eval()
    peft = get_peft_model(base, SVFConfig(**options), adapter_name=names[0])
    for name in names[1:]:
        peft.add_adapter(name, SVFConfig(**options))
    for seed, name in enumerate(names):
        set_z(peft, name, seed)
    return peft.eval()


def set_z(model: PeftModel, name: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, layer in svf_layers(model):
            own = layer.changes().get(name)
            if own is None:
                continue
            own.copy_(0.2 * torch.randn(own.shape, generator=generator))


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor = IDS, **options: Any) -> torch.Tensor:
    result: torch.Tensor = model(input_ids=ids, use_cache=False, **options).logits
    return result
