"""A tiny model of two layers with four heads each, its text, and a training loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tests.minimal_adapter import tiny_llama
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from pliant.anatomy import Anatomy
from pliant.structure import Plasticity, PlasticityConfig, attach, attach_plasticity

SHORT = {"prune": 0.5, "regrow": 0.25, "adapt": 3, "learn": 4, "warmup": 2}
"""A cycle of seven steps that closes four of eight heads and opens two."""


def ids(rows: int, seed: int) -> Tensor:
    return torch.randint(0, 60, (rows, 12), generator=torch.Generator().manual_seed(seed))


BATCHES = [{"input_ids": ids(8, 0)}]
HELD_OUT = [{"input_ids": ids(4, 1)}]


def model_of(**sizes: Any) -> Any:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "initializer_range": 0.3}
    return tiny_llama(**{**heads, **sizes})


def plasticity_of(model: Any = None, **config: Any) -> Plasticity:
    gates = attach(model_of() if model is None else model)
    gates.requires_grad_(False)
    plasticity = attach_plasticity(gates, PlasticityConfig(**{**SHORT, **config}))
    plasticity.measure_on(BATCHES, HELD_OUT)
    return plasticity


def optimizer_of(plasticity: Plasticity) -> torch.optim.Optimizer:
    trained = [p for p in plasticity.base.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01, weight_decay=0.1)
    plasticity.own_group(optimizer, 0.01)
    return optimizer


def train(plasticity: Plasticity, optimizer: Any, steps: int, start: int = 0) -> None:
    """Steps start, ..., steps - 1."""
    model: Any = plasticity.base
    for step in range(start, steps):
        plasticity.begin_step()
        batch = ids(4, 100 + step)
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        plasticity.before_update()
        optimizer.step()
        plasticity.after_update()
        optimizer.zero_grad()


def trainer_of(plasticity: Plasticity, folder: Path, steps: int = 7, **args: Any) -> Trainer:
    rows = [{"input_ids": row, "labels": row} for row in ids(4 * steps, 7)]
    settings = {"max_steps": steps, "per_device_train_batch_size": 4, "learning_rate": 0.01}
    common = {"report_to": "none", "weight_decay": 0.1, "disable_tqdm": True, "use_cpu": True}
    options: Any = {**settings, **common, "save_strategy": "no", **args}
    return Trainer(plasticity.base, TrainingArguments(str(folder), **options), train_dataset=rows)


def head_weights(model: nn.Module, layer: int, head: int) -> dict[str, Tensor]:
    """What this head alone has: its rows of query, key and value, its columns of the output."""
    attention = Anatomy.of(model).layers[layer].self_attn
    width = attention.head_dim
    own = slice(head * width, (head + 1) * width)
    rows = {name: getattr(attention, f"{name}_proj").weight.detach()[own].clone() for name in "qkv"}
    return {**rows, "o": attention.o_proj.weight.detach()[:, own].clone()}  # type: ignore[operator]


def closed_heads(plasticity: Plasticity) -> list[tuple[int, int]]:
    gates = plasticity.gates
    return [(i, h) for i in (0, 1) for h in (gates["heads", i] == 0).nonzero().flatten().tolist()]
