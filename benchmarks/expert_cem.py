"""A round of the cross-entropy method: all candidates in one batch, against merging each.

    python -m benchmarks.expert_cem [--model nano-l | --hidden 512]

Both score the same mixtures of experts by the likelihood of the same shots. The control writes
each candidate's z into one expert, merges it into the weights, runs the shots, and unmerges, which
is the fastest way that gives all rows of a batch the same expert. A whole search runs with each of
the two, and their results are compared.
Times are CPU seconds of this process, on one thread.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.harness import interleaved, keep
from benchmarks.random_experts import with_random_experts
from pliant import load, nano
from pliant.experts.adapting.cem import CEMConfig, Scores, search
from pliant.experts.adapting.few_shot import FewShotConfig, Layout, likelihood_of, likelihoods
from pliant.experts.adapting.shots import Shot
from pliant.experts.model import svf_layers
from pliant.loading import load_tokenizer
from pliant.stats import Floats

TARGET = 2.0
NAMES = ("first", "second", "third")
CANDIDATE = "candidate"
SPREAD = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="nano-l")
    parser.add_argument("--hidden", type=int, help="a random Llama of this width instead")
    parser.add_argument("--population", type=int, default=32)
    parser.add_argument("--shots", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--scopes", nargs="+", default=["global", "layer"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.hidden:
        options.model = f"hidden-{options.hidden}"
        base, tokenizer = llama(options.hidden), load_tokenizer("nano-l")
    else:
        base, tokenizer = load(options.model)
    model = with_random_experts(base, NAMES, SPREAD)
    shots = [Shot(q.prompt, q.answer) for q in nano.questions("train", options.shots)]
    figures = {}
    for scope in options.scopes:
        layout = Layout.of(model, NAMES, FewShotConfig(scope=scope))
        likelihood = likelihood_of(model, tokenizer, shots, NAMES)
        batched = likelihoods(likelihood, layout)
        # With one candidate at a time, one padded batch is faster than several of equal lengths.
        padded = likelihood_of(model, tokenizer, shots, NAMES, slack=float("inf"))
        merging = by_merging(model, padded, layout)
        figures[scope] = measured(batched, merging, layout, options)
    Console().print(table(figures, options))
    sizes = {"population": options.population, "shots": options.shots, "experts": len(NAMES)}
    which = f"--hidden {options.hidden}" if options.hidden else f"--model {options.model}"
    command = f"python -m benchmarks.expert_cem {which} --population {options.population}"
    keep(f"expert_cem_{options.model}", {"model": options.model, **sizes, **figures}, command)


def measured(
    batched: Callable[[Floats], Scores],
    merging: Callable[[Floats], Scores],
    layout: Layout,
    options: Any,
) -> dict[str, Any]:
    candidates = np.random.default_rng(0).normal(0.3, 0.5, (options.population, layout.size))
    difference = np.abs(batched(candidates).values - merging(candidates).values).max()
    runs = {"one batch": lambda: batched(candidates), "merging each": lambda: merging(candidates)}
    times = interleaved(runs, rounds=options.rounds, clock=time.process_time)
    config = CEMConfig(population=options.population, iterations=2)
    both = (batched, merging)
    best = [search(score, layout.size, config, groups=layout.groups).best for score in both]
    return {
        "seconds": {name: each.median for name, each in times.items()},
        "merging / one batch": times["merging each"].ratio_to(times["one batch"]).as_dict(),
        "largest difference of a likelihood": float(difference),
        "same result of a search": bool(np.allclose(*best, atol=1e-4)),
    }


def by_merging(model: Any, likelihood: Any, layout: Layout) -> Callable[[Floats], Scores]:
    """The same scores, one candidate after the other."""
    if CANDIDATE not in model.peft_config:
        zeros = [0.0] * len(layout.names)
        model.base_model.add_weighted_adapter(list(layout.names), zeros, CANDIDATE)

    def score(candidates: Floats) -> Scores:
        weights = layout.weights(torch.from_numpy(candidates).float())
        values = []
        model.set_adapter(CANDIDATE)
        model.requires_grad_(False)
        for i in range(len(candidates)):
            with torch.no_grad():
                for _, layer in svf_layers(model):
                    d = layer.changes()
                    at = weights if weights.dim() == 2 else weights[layer.layer_index]
                    d[CANDIDATE].copy_(
                        sum(at[i, k] * d[name] for k, name in enumerate(layout.names))
                    )
            model.merge_adapter()
            values.append(float(likelihood().mean()))
            model.unmerge_adapter()
        return Scores(np.array(values))

    def restored(candidates: Floats) -> Scores:
        try:
            return score(candidates)
        finally:
            model.set_adapter(NAMES[0])
            model.requires_grad_(False)

    return restored


def llama(hidden: int) -> LlamaForCausalLM:
    """A random Llama of two layers: the ratio of the times does not depend on their number."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=hidden,
        intermediate_size=hidden * 43 // 16,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    return LlamaForCausalLM(config).eval()


def table(figures: dict[str, Any], options: Any) -> Table:
    title = (
        f"{options.population} candidates, {options.shots} shots, {options.model}; "
        f"target >= {TARGET:g}x"
    )
    rows = Table("coefficients", "one batch", "merging each", "x", "same", title=title)
    for name, figure in figures.items():
        seconds, ratio = figure["seconds"], figure["merging / one batch"]
        spread = f"{ratio['lower_quartile']:.2f} to {ratio['upper_quartile']:.2f}"
        rows.add_row(
            name,
            f"{seconds['one batch']:.3f} s",
            f"{seconds['merging each']:.3f} s",
            f"{ratio['median']:.2f} ({spread})",
            str(figure["same result of a search"]),
        )
    return rows


if __name__ == "__main__":
    main()
