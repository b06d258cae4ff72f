"""What a score costs that is read while the model generates, against generating alone.

    python -m benchmarks.score_generate

Both run the same prompt through the same model and generate greedily; tokens are compared in every
round. A score from a forward of its own, before generating, is in the table as a second control.
Seconds are of this process's own work, on one thread.
"""

from __future__ import annotations

import argparse
import os
import time
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.harness import interleaved, keep
from pliant.complexity import Complexity, CPXConfig, attach
from pliant.prefill import prefill

COMMAND = "python -m benchmarks.score_generate"
REACH = 1.03
SETTINGS: dict[str, dict[str, Any]] = {
    "one row": {},
    "four rows, LoRA of rank 4": {"rows": 4, "aggregation": "mean", "lora_rank": 4},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompt", type=int, default=1_000, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens generated")
    parser.add_argument("--rounds", type=int, default=21)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    model = llama()
    ids = torch.randint(0, 2_000, (1, asked.prompt), generator=torch.Generator().manual_seed(0))
    figures = {name: measured(model, ids, asked, **s) for name, s in SETTINGS.items()}
    Console().print(table(figures, asked))
    keep(
        "score_generate",
        {"model": sizes().to_diff_dict(), "prompt": asked.prompt, "new": asked.new, **figures},
        COMMAND,
    )


def measured(model: PreTrainedModel, ids: Tensor, asked: Any, **settings: Any) -> dict[str, Any]:
    options = {
        "max_new_tokens": asked.new,
        "min_new_tokens": asked.new,
        "do_sample": False,
        "pad_token_id": 0,
    }
    scorer = attach(model, CPXConfig(**settings))
    with torch.no_grad():
        for parameter in scorer.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    plain = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    told = scorer.score(ids.tolist()).score

    def alone() -> None:
        model.generate(ids, attention_mask=torch.ones_like(ids), **options)

    def scored() -> None:
        found = scorer.generate(ids, **options)
        assert torch.equal(found.outputs[0], plain) and not found.prefilled_again
        assert abs(found.scores.score - told).max() < 1e-4

    def before() -> None:
        scorer.score(ids.tolist())
        alone()

    runs = {"generate": alone, "score + generate": scored, "score, then generate": before}
    times = interleaved(runs, rounds=asked.rounds, clock=time.process_time)
    step = step_time(scorer, ids, asked.rounds)
    scorer.detach()
    return {
        "seconds": {name: taken.median for name, taken in times.items()},
        "ratio": {
            name: times[name].ratio_to(times["generate"]).as_dict()
            for name in ("score + generate", "score, then generate")
        },
        "seconds of the step alone": step,
        "tokens identical": True,
        "trainable numbers": sum(p.numel() for p in scorer.parameters()),
    }


def step_time(scorer: Complexity, ids: Tensor, rounds: int) -> float:
    """The rows on a prompt that has been run: what scoring adds, without generation's own noise."""
    with torch.no_grad():
        ran = prefill(scorer.anatomy, ids, head=False)
        runs = {"step": lambda: scorer.logits_of(ran)}
        return interleaved(runs, rounds=rounds, clock=time.process_time)["step"].median


def sizes() -> LlamaConfig:
    """Eight layers as Llama has them."""
    return LlamaConfig(
        vocab_size=2_000,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2_048,
    )


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(sizes()).eval().requires_grad_(False)


def table(figures: dict[str, Any], asked: Any) -> Table:
    title = f"{asked.prompt:,} prompt tokens, {asked.new} new, 8 layers; reach <= {REACH}x"
    drawn = Table("scorer", "run", "seconds", "x generate alone", title=title)
    for name, found in figures.items():
        for run, seconds in found["seconds"].items():
            ratio = found["ratio"].get(run, {"median": 1.0})
            told = f"{ratio['median']:.4f}"
            if "lower_quartile" in ratio:
                told += f" ({ratio['lower_quartile']:.4f} to {ratio['upper_quartile']:.4f})"
            drawn.add_row(name, run, f"{seconds:.4f}", told)
        drawn.add_row(name, "the step alone", f"{found['seconds of the step alone']:.4f}", "")
    return drawn


if __name__ == "__main__":
    main()
