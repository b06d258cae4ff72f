"""What choosing an expert costs, compared with the answer that the expert gives.

    python -m benchmarks.expert_first_pass [--model nano-l]

The second pass is the answer, 64 tokens with the experts that were chosen. The first pass is what
comes before it: the model classifies the question by labels; a linear head reads the last layer in
a forward of its own; or, where the experts leave the first layers alone, the head reads the
answer's own prefill, and its cost is the difference of two runs. Labels can share these layers,
too: the last rows compare the choice and the first token of the answer with and without that, for
prompts of several lengths. Times are CPU seconds of this process, on one thread.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import real_model
from benchmarks.harness import Ratio, interleaved, keep
from benchmarks.random_experts import with_random_experts
from pliant import load, nano
from pliant.experts.adapting import (
    ByClassifier,
    ByPrompt,
    ClassifierConfig,
    Strategy,
    by_prompt,
    generate,
)

TARGET = 0.05
LABELS = {"sums": "arithmetic", "words": "the letters of words"}
FAMILIES = {"sums": "add", "words": "reverse"}
SPREAD = 0.05
LENGTHS = (16, 96)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="nano-l")
    parser.add_argument("--new", type=int, default=64, help="tokens of the second pass")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict[str, Any] = {}
    for half in (False, True):
        model, tokenizer = with_experts(options.model, half)
        for size in options.batches:
            name = f"{'later half' if half else 'all'} layers, batch of {size}"
            figures[name] = measured(model, tokenizer, size, options, half)
    Console().print(table(figures, options))
    name = real_model.result_name(
        "expert_first_pass", None if options.model == "nano-l" else options.model
    )
    command = f"python -m benchmarks.expert_first_pass --model {options.model}"
    keep(name, {"model": options.model, "new": options.new, **figures}, command)


def measured(model: Any, tokenizer: Any, size: int, options: Any, half: bool) -> dict[str, Any]:
    asked = [q.prompt for q in nano.questions("dev", size, families=list(FAMILIES.values()))]
    settings = {"max_new_tokens": options.new, "min_new_tokens": options.new}
    labels, head = ByPrompt(model, tokenizer, LABELS), fitted(model, tokenizer, half)
    assert head.shares_prefill == half
    assert labels.shares_prefill == half
    labels.choose(asked)  # computes the labels' prior, once
    mixtures = head.adapt(asked)
    runs = {
        "answer": lambda: generate(model, tokenizer, asked, mixtures, **settings),
        "labels": lambda: labels.choose(asked),
        "head": lambda: head.choose(asked),
        "answer with its choice": lambda: head.answer(asked, **settings),
    }
    times = interleaved(runs, rounds=options.rounds, clock=time.process_time)
    ratios = {name: times[name].ratio_to(times["answer"]).as_dict() for name in ("labels", "head")}
    if not head.shares_prefill:
        return {"seconds": {name: each.median for name, each in times.items()}, "ratio": ratios}
    both, alone = times["answer with its choice"].seconds, times["answer"].seconds
    extra = Ratio(tuple((whole - part) / part for whole, part in zip(both, alone, strict=True)))
    ratios["head, choosing in the answer"] = extra.as_dict()
    for length in LENGTHS:
        name = f"labels in the prefill of {length} letters / before it"
        ratios[name] = sharing(labels, asked, length, options.rounds)
    return {"seconds": {name: each.median for name, each in times.items()}, "ratio": ratios}


def sharing(labels: ByPrompt, asked: Sequence[str], length: int, rounds: int) -> dict[str, float]:
    """The choice and the first token, with a shared prefill over without, however short it is."""
    longer = [(f"{prompt}, " * length)[:length] for prompt in asked]
    runs = {
        "shared": lambda: labels.answer(longer, max_new_tokens=1),
        "apart": lambda: Strategy.answer(labels, longer, max_new_tokens=1),
    }
    with patch.object(by_prompt, "SHARE_FROM", 0):
        times = interleaved(runs, rounds=rounds, clock=time.process_time)
    return times["shared"].ratio_to(times["apart"]).as_dict()


def fitted(model: Any, tokenizer: Any, half: bool) -> ByClassifier:
    """A head after the last layer, or after the first half of the layers."""
    depth = len(model.base_model.model.model.layers)
    known = [
        (q.prompt, name)
        for name, family in FAMILIES.items()
        for q in nano.questions("train", 16, families=[family])
    ]
    config = ClassifierConfig(layer=depth // 2 if half else depth, strength=1.0)
    prompts, experts = zip(*known, strict=True)
    return ByClassifier.fit(model, tokenizer, prompts, experts, config)


def with_experts(name: str, half: bool) -> tuple[Any, Any]:
    """The model with two experts of random z, on all layers or on the later half of them."""
    base, tokenizer = load(name)
    depth = len(base.model.layers)
    settings: dict[str, Any] = {}
    if half:
        layers = list(range(depth // 2, depth))
        projections = ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        settings = {"target_modules": projections, "layers_to_transform": layers}
    return with_random_experts(base, list(LABELS), SPREAD, **settings), tokenizer


def table(figures: dict[str, Any], options: Any) -> Table:
    title = f"The choice over an answer of {options.new} tokens, {options.model}; <= {TARGET}x"
    rows = Table("experts on", "choice", "answer", "x", title=title)
    for name, figure in figures.items():
        for way, ratio in figure["ratio"].items():
            text = f"{ratio['median']:.3f}"
            if "lower_quartile" in ratio:
                text += f" ({ratio['lower_quartile']:.3f} to {ratio['upper_quartile']:.3f})"
            rows.add_row(name, way, f"{figure['seconds']['answer']:.3f} s", text)
    return rows


if __name__ == "__main__":
    main()
