"""Perplexity after half of a mixture's experts are removed, by several ways of choosing them.

    python -m benchmarks.structure_experts --data FOLDER

A small Mixtral is trained on bytes of GSM8K and WikiText-2 for a few CPU-minutes. FOLDER holds
`gsm8k-{train,test}.jsonl.gz` and `wikitext2-{valid,test}.txt.gz`. Calibration text is from the
training text; perplexity is measured on both test sets, before any further training. Every way
removes as many experts from every layer. The model of the default way is exported, loaded with
plain transformers, and measured again.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from benchmarks.byte_models import LENGTH, calibration_pieces, test_pieces, trained
from benchmarks.harness import keep
from pliant.reports.tables import Table
from pliant.structure import close_experts, export, perplexity

SEEDS = 5
SHARE = 0.5
WAYS = ("relative_activation", "activation", "frequency", "fisher", "magnitude")
SIZES = {
    "vocab_size": 256,
    "hidden_size": 96,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 16,
    "num_experts_per_tok": 2,
    "max_position_embeddings": LENGTH,
    "tie_word_embeddings": True,
    "output_router_logits": False,
}


def main(
    data: Annotated[Path, typer.Option(help="The folder of the texts.")],
    steps: Annotated[int, typer.Option(help="Of training.")] = 800,
    tokens: Annotated[int, typer.Option(help="Bytes of calibration text.")] = 16_384,
    test: Annotated[int, typer.Option(help="Bytes of each test text.")] = 16_384,
) -> None:
    """Print the table and write the result."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    untrained = MixtralForCausalLM(MixtralConfig(**SIZES))
    # With the loss that keeps experts in even use, as mixtures are trained.
    model, seconds = trained("structure_experts", untrained, data, steps, output_router_logits=True)
    fitted, tests = calibration_pieces(data, tokens), test_pieces(data, test)
    whole = _perplexities(model, tests)
    figures: dict[str, Any] = {"sizes": SIZES, "steps": steps, "training CPU seconds": seconds}
    figures |= {"calibration bytes": tokens, "test bytes": test, "whole": whole, "share": SHARE}
    ways = {way: _ratios(model, fitted, tests, whole, way) for way in WAYS}
    random = [_ratios(model, fitted, tests, whole, "random", seed) for seed in range(SEEDS)]
    ways["random, mean"] = {name: mean(ratios[name] for ratios in random) for name in tests}
    ways["random, best"] = {name: min(ratios[name] for ratios in random) for name in tests}
    figures |= {"ratios": ways, "random seeds": SEEDS}
    figures["exported"] = _exported(model, fitted, tests)
    draw(figures).draw(Console(highlight=False))
    print(figures["exported"])
    keep("structure_experts", figures, "python -m benchmarks.structure_experts --data FOLDER")


def _ratios(
    model: Any, fitted: Any, tests: Any, whole: dict[str, float], way: Any, seed: int = 0
) -> dict[str, float]:
    """Perplexities after removal, relative to the whole model's."""
    closed = close_experts(model, fitted, SHARE, way, seed=seed)
    after = _perplexities(model, tests)
    closed.detach()
    return {name: after[name] / whole[name] for name in tests}


def _exported(model: Any, fitted: Any, tests: Any) -> dict[str, Any]:
    """The default way's stock checkpoint beside the live model."""
    closed = close_experts(model, fitted, SHARE)
    live = _perplexities(model, tests)
    with tempfile.TemporaryDirectory() as folder:
        result = export(model, Path(folder) / "smaller")
        stock = AutoModelForCausalLM.from_pretrained(Path(folder) / "smaller").eval()
    closed.detach()
    sizes = {"parameters": result.parameters, "before": result.parameters_before}
    return {"live": live, "stock": _perplexities(stock, tests), **sizes}


def _perplexities(model: Any, tests: dict[str, Any]) -> dict[str, float]:
    return {name: perplexity(model, batches) for name, batches in tests.items()}


def draw(figures: dict[str, Any]) -> Table:
    names = list(figures["whole"])
    rows = [
        [way, *(f"{ratios[name]:.3f}" for name in names)]
        for way, ratios in figures["ratios"].items()
    ]
    title = f"Half of {SIZES['num_local_experts']} experts removed: perplexity, relative to all"
    return Table(title, ["way", *names], rows, right=frozenset(names))


if __name__ == "__main__":
    typer.run(main)
