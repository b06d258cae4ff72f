"""What gates cost, and what removal saves: prefill, a training step, and decoding.

    python -m benchmarks.structure_speed [--rounds 7]

A Llama of ten layers (hidden 512, 16 heads on 4 KV heads, random weights), 1,024 tokens. Beside it:
the same with gates at 1 on heads, channels and layers; with gates at 0 on half of the KV groups,
which saves nothing; and smaller stock models, without half of the KV groups, a quarter of the
channels, or a fifth of the layers. Times are process time on one thread, interleaved.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.harness import interleaved, keep
from pliant.reports.tables import Table
from pliant.structure import GateConfig, attach
from pliant.structure.stock.smaller import with_fewer, without_layers

LAYERS, TOKENS, NEW = 10, 1_024, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    ids = torch.randint(0, 2_000, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    ways = models()
    figures: dict[str, Any] = {"cache": {name: cache_size(m, ids) for name, m in ways.items()}}
    for what, measure in {"prefill": prefill, "train": train, "decode": decode}.items():
        runs = {name: measure(model, ids) for name, model in ways.items()}
        times = interleaved(runs, rounds=rounds, clock=time.process_time)
        whole = times["the original"]
        figures[what] = {name: own.ratio_to(whole).as_dict() for name, own in times.items()}
    table(figures).draw(Console())
    keep("structure_speed", figures, "python -m benchmarks.structure_speed")


def models() -> dict[str, Any]:
    gated, closed = llama(), llama()
    attach(gated, GateConfig(("heads", "channels", "layers"))).requires_grad_(False)
    gates = attach(closed, GateConfig(("heads",))).requires_grad_(False)
    with torch.no_grad():
        for i in range(LAYERS):
            gates["heads", i][8:] = 0
    return {
        "the original": llama(),
        "gates at 1": gated,
        "half of the KV groups gated": closed,
        "half of the KV groups removed": fewer("heads", 2),
        "a quarter of the channels removed": fewer("channels", 1_056),
        "a fifth of the layers removed": without_layers(llama(), list(range(8))).build(),
    }


def fewer(kind: Any, count: int) -> Any:
    remaining = {str(i): torch.arange(count) for i in range(LAYERS)}
    return next(with_fewer(llama(), kind, remaining)).build()


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2_000,
        hidden_size=512,
        intermediate_size=1_408,
        num_hidden_layers=LAYERS,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=2_048,
    )
    return LlamaForCausalLM(config).eval()


def prefill(model: Any, ids: torch.Tensor) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad():
            model(input_ids=ids, use_cache=True, logits_to_keep=1)

    return run


def train(model: Any, ids: torch.Tensor) -> Callable[[], None]:
    def run() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)

    return run


def decode(model: Any, ids: torch.Tensor) -> Callable[[], None]:
    """A few steps on the prompt's cache, which is cropped again."""
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values

    def run() -> None:
        with torch.no_grad():
            for _ in range(NEW):
                model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)
        cache.crop(-NEW)

    return run


def cache_size(model: Any, ids: torch.Tensor) -> float:
    """The cache's bytes for this prompt, in MB."""
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
    return float(sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values)) / 1e6)


def table(figures: dict[str, Any]) -> Table:
    head = ["model", "prefill", "train", "decode", "cache, MB"]
    rows = [
        [
            name,
            *(f"{figures[what][name]['median']:.3f}" for what in head[1:4]),
            f"{figures['cache'][name]:.1f}",
        ]
        for name in figures["cache"]
    ]
    return Table("time, relative to the original's", head, rows, right=frozenset(head[1:]))


if __name__ == "__main__":
    main()
