"""The cost of a score that is read while the model generates, against generating alone.

    python -m benchmarks.score_generate [--model smollm2-135m]

Both run the same prompt through the same model and generate greedily; tokens are compared in every
round. A second control computes the score in a forward pass of its own, before generating. Times
are CPU seconds of this process, on one thread.
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

from benchmarks import real_model
from benchmarks.harness import interleaved, keep
from pliant.complexity import Complexity, CPXConfig, attach
from pliant.prefill import prefill

TARGET = 1.03
SETTINGS: dict[str, dict[str, Any]] = {
    "one row": {},
    "four rows, LoRA of rank 4": {"rows": 4, "aggregation": "mean", "lora_rank": 4},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompt", type=int, default=1_000, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens generated")
    parser.add_argument("--rounds", type=int, default=21)
    real_model.add_model_option(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.model:
        model = real_model.real_model(options.model, options.dtype)
        ids = real_model.prompts(options.model, 1, options.prompt)
    else:
        model = llama()
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, 2_000, (1, options.prompt), generator=generator)
    figures = {name: measured(model, ids, options, **s) for name, s in SETTINGS.items()}
    Console().print(table(figures, options))
    described = real_model.described(options.model, model.config, options.dtype)
    keep(
        real_model.result_name("score_generate", options.model),
        {"model": described, "prompt": options.prompt, "new": options.new, **figures},
        real_model.command("score_generate", options.model),
    )


def measured(model: PreTrainedModel, ids: Tensor, options: Any, **settings: Any) -> dict[str, Any]:
    generation = {
        "max_new_tokens": options.new,
        "min_new_tokens": options.new,
        "do_sample": False,
        "pad_token_id": 0,
    }
    scorer = attach(model, CPXConfig(**settings))
    with torch.no_grad():
        for parameter in scorer.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    plain = model.generate(ids, attention_mask=torch.ones_like(ids), **generation)
    score = scorer.score(ids.tolist()).score

    def alone() -> None:
        model.generate(ids, attention_mask=torch.ones_like(ids), **generation)

    def scored() -> None:
        output = scorer.generate(ids, **generation)
        assert torch.equal(output.outputs[0], plain) and not output.prefilled_again
        assert abs(output.scores.score - score).max() < 1e-4

    def before() -> None:
        scorer.score(ids.tolist())
        alone()

    runs = {"generate": alone, "score + generate": scored, "score, then generate": before}
    times = interleaved(runs, rounds=options.rounds, clock=time.process_time)
    step = step_time(scorer, ids, options.rounds)
    scorer.detach()
    return {
        "seconds": {name: seconds.median for name, seconds in times.items()},
        "ratio": {
            name: times[name].ratio_to(times["generate"]).as_dict()
            for name in ("score + generate", "score, then generate")
        },
        "seconds of the step alone": step,
        "tokens identical": True,
        "trainable numbers": sum(p.numel() for p in scorer.parameters()),
    }


def step_time(scorer: Complexity, ids: Tensor, rounds: int) -> float:
    """The seconds of the rows on a prefilled prompt: what scoring adds to a generation."""
    with torch.no_grad():
        prefilled = prefill(scorer.anatomy, ids, head=False)
        runs = {"step": lambda: scorer.logits_of(prefilled)}
        return interleaved(runs, rounds=rounds, clock=time.process_time)["step"].median


def sizes() -> LlamaConfig:
    """A Llama of eight layers."""
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


def table(figures: dict[str, Any], options: Any) -> Table:
    name = options.model or "8 layers"
    title = f"{options.prompt:,} prompt tokens, {options.new} new, {name}; target <= {TARGET}x"
    rows = Table("scorer", "run", "seconds", "x generate alone", title=title)
    for name, figure in figures.items():
        for run, seconds in figure["seconds"].items():
            ratio = figure["ratio"].get(run, {"median": 1.0})
            text = f"{ratio['median']:.4f}"
            if "lower_quartile" in ratio:
                text += f" ({ratio['lower_quartile']:.4f} to {ratio['upper_quartile']:.4f})"
            rows.add_row(name, run, f"{seconds:.4f}", text)
        rows.add_row(name, "the step alone", f"{figure['seconds of the step alone']:.4f}", "")
    return rows


if __name__ == "__main__":
    main()
