"""The cost of a scorer that reads a middle layer, against one that reads the last layer.

    python -m benchmarks.early_exit [--model smollm2-135m --layer 20]

`cost` measures one scorer against the other on the same prompts. The table also shows the cost of a
prompt that leaves (it is scored in the prefill and not generated from) and of a prompt that stays
(the remaining layers run as well).
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks import real_model
from benchmarks.harness import Ratio, interleaved, keep
from benchmarks.score_generate import llama
from pliant.complexity import CPXConfig, attach

TARGET = 0.6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--lengths", type=int, nargs="*", default=[64, 256, 1_000])
    parser.add_argument("--layer", type=int, help="the layer that is read; half of the depth")
    real_model.add_model_option(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = real_model.real_model(options.model, options.dtype) if options.model else llama()
    depth = model.config.num_hidden_layers
    layer = options.layer or depth // 2
    figures: dict[str, Any] = {}
    for length in options.lengths:
        if options.model:
            prompts = real_model.prompts(options.model, 4, length).tolist()
        else:
            generator = torch.Generator().manual_seed(length)
            prompts = torch.randint(0, 2_000, (4, length), generator=generator).tolist()
        ratio = cost(model, prompts, layer, rounds=options.rounds)
        figures[str(length)] = {
            f"score at layer {layer} of {depth}": ratio.as_dict(),
            **generation(model, prompts[:1], layer, options.rounds),
        }
    Console().print(table(figures, layer, depth))
    described = real_model.described(options.model, model.config, options.dtype)
    command = real_model.command("early_exit", options.model)
    keep(
        real_model.result_name("early_exit", options.model),
        {"model": described, "batch": 4, **figures},
        command + f" --layer {layer}" * bool(options.model),
    )


def cost(
    model: nn.Module, prompts: Sequence[Any], layer: int, *, rounds: int = 11, tokenizer: Any = None
) -> Ratio:
    """The time of scoring `prompts` at `layer`, relative to scoring them at the last layer."""
    early = attach(model, CPXConfig(layer=layer), tokenizer, name="at-layer")
    full = attach(model, CPXConfig(), tokenizer, name="at-the-end")
    runs = {"early": lambda: early.score(prompts), "full": lambda: full.score(prompts)}
    try:
        times = interleaved(runs, rounds=rounds, clock=time.process_time)
    finally:
        early.detach()
        full.detach()
    return times["early"].ratio_to(times["full"])


def generation(model: Any, prompts: list[list[int]], layer: int, rounds: int) -> dict[str, Any]:
    """The cost of a prompt up to its first generated token."""
    options = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 0}
    ids = torch.tensor(prompts)
    mask = torch.ones_like(ids)
    early = attach(model, CPXConfig(layer=layer), name="at-layer")
    full = attach(model, CPXConfig(), name="at-the-end")
    runs = {
        "generate": lambda: model.generate(ids, attention_mask=mask, **options),
        "leaves": lambda: early.generate(ids, leave_above=0.0, **options),
        "stays": lambda: early.generate(ids, leave_above=1.0, **options),
        "stays, read at the end": lambda: full.generate(ids, leave_above=1.0, **options),
    }
    times = interleaved(runs, rounds=rounds, clock=time.process_time)
    early.detach()
    full.detach()
    return {
        name: seconds.ratio_to(times["generate"]).as_dict()
        for name, seconds in times.items()
        if name != "generate"
    }


def table(figures: dict[str, Any], layer: int, depth: int) -> Table:
    title = f"{depth} layers, read after {layer}; target of the score: <= {TARGET}x"
    columns = list(next(iter(figures.values())))
    rows = Table("tokens", columns[0] + f" / at {depth}", *columns[1:], title=title)
    for length, figure in figures.items():
        rows.add_row(length, *(f"{figure[name]['median']:.3f}" for name in columns))
    rows.caption = "The last three: relative to a prefill and one token of plain generation."
    return rows


if __name__ == "__main__":
    main()
