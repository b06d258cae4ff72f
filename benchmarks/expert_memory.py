"""The memory of training by reward: the disabled expert as the reference, and a copied model.

    python -m benchmarks.expert_memory

One step on a random model of SmolLM2's geometry in fp32, 16 sequences of 64 tokens, with gradient
checkpointing: the reference's log-probabilities, the policy's, and a backward pass. `a copy` keeps
a second model as the reference; `as published` also keeps U, S and V of each weight and rebuilds
the weight from them. Each way runs in a process of its own; memory is what the process allocates
above one that only imports. The allocator returns each freed tensor to the system at once, since
otherwise the peak depends on what it holds back.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
from typing import Any

import torch
from peft import get_peft_model
from rich.console import Console
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.harness import keep
from benchmarks.structure_streaming import peak
from pliant.experts import SVFConfig
from pliant.reports.tables import Table

WAYS = (
    "imports alone",
    "delta",
    "delta, a copy",
    "folded",
    "folded, a copy",
    "as published, a copy",
)
ROWS, TOKENS = 16, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--way", choices=WAYS)
    way = parser.parse_args().way
    if way is not None:
        torch.set_num_threads(1)
        with peak() as figures:
            run(way)
        print(json.dumps(figures))
        return
    peaks = {name: in_a_process(name)["peak"] for name in WAYS}
    idle = peaks.pop(WAYS[0])
    figures = {name: {"MB": own - idle} for name, own in peaks.items()}
    for name, own in figures.items():
        form = "delta" if name.startswith("delta") else "folded"
        own["of the copy's"] = own["MB"] / figures[f"{form}, a copy"]["MB"]
        own["of the published"] = own["MB"] / figures["as published, a copy"]["MB"]
        own["weights, MB"] = weights() if name == "delta" else 0.0
    rows = [[n, *(f"{own[k]:.2f}" for k in list(own)[:3])] for n, own in figures.items()]
    head = ("way", "MB", "of the copy's", "of the published")
    Table("peak memory of a step", head, rows, right=frozenset(head[1:])).draw(Console())
    keep("expert_memory", figures, "python -m benchmarks.expert_memory")


def in_a_process(way: str) -> Any:
    command = [sys.executable, "-m", "benchmarks.expert_memory", "--way", way]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    printed = subprocess.run(
        command, check=True, capture_output=True, text=True, env=environment
    ).stdout
    return json.loads(printed.splitlines()[-1])


def weights() -> float:
    with torch.device("meta"):
        return 4 * sum(p.numel() for p in LlamaForCausalLM(config()).parameters()) / 1e6


def config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=4_000,
        hidden_size=576,
        intermediate_size=1_536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )


def run(way: str) -> None:
    if way == WAYS[0]:
        return
    torch.manual_seed(0)
    ids = torch.randint(5, 4_000, (ROWS, TOKENS))
    base = LlamaForCausalLM(config())
    reference = copy.deepcopy(base).requires_grad_(False) if "copy" in way else None
    if way.startswith("as published"):
        model: Any = rebuilt(base)
    else:
        form: Any = way.split(",")[0]
        model = get_peft_model(base, SVFConfig(form=form))
        for name, parameter in model.named_parameters():
            if "svf_z" in name:
                nn.init.normal_(parameter, std=0.01)
    base.gradient_checkpointing_enable({"use_reentrant": False})
    base.train()
    with torch.no_grad():
        if reference is not None:
            before = log_probabilities(reference, ids)
        else:
            with model.disable_adapter():
                before = log_probabilities(model, ids)
        log_probabilities(model, ids)  # of the rollouts
    now = log_probabilities(model, ids)
    (now - before).exp().sub(1).sub(now - before).sum().backward()


def log_probabilities(model: Any, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return logits.log_softmax(-1).gather(-1, ids[:, 1:, None])


class SingularValues(nn.Module):
    """U diag(s z) V^T in place of a weight."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        u, s, vt = torch.linalg.svd(weight, full_matrices=False)
        self.u, self.s, self.vt = (nn.Parameter(t, requires_grad=False) for t in (u, s, vt))
        self.z = nn.Parameter(torch.ones_like(s))

    def forward(self, weight: Tensor) -> Tensor:
        return (self.u * (self.s * self.z)) @ self.vt


def rebuilt(model: Any) -> Any:
    model.requires_grad_(False)
    for layer in model.model.layers:
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                parametrize.register_parametrization(
                    module, "weight", SingularValues(module.weight.data), unsafe=True
                )
    return model


if __name__ == "__main__":
    main()
