"""Perplexity after pruning, before any training: ours beside simple ways.

    python -m benchmarks.structure_prune --model smollm2-135m --data FOLDER [--part layers]

FOLDER holds `gsm8k-{train,test}.jsonl.gz` and `wikitext2-{valid,test}.txt.gz`: half of the
calibration text is GSM8K's training set, half WikiText-2's validation set; perplexity is measured
on pieces of both test sets. Every way removes the same share of channels (or heads) from every
layer, as a stock checkpoint needs, or whole layers. Where Torch-Pruning is installed, it removes
channels as well (`--others` adds it alone to a result that is there). Figures are perplexities
relative to the whole model's.
"""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks import torch_pruning_control
from benchmarks.harness import RESULTS, keep
from benchmarks.real_model import result_name
from pliant.loading import load
from pliant.reports.tables import Table
from pliant.structure import PruneConfig, perplexity, prune

LENGTH, ROWS = 512, 4
SHARES = {"channels": (0.25, 0.5), "heads": (1 / 3, 2 / 3), "layers": (0.1, 0.2)}
WAYS: dict[str, dict[str, Any]] = {
    "error, compensated": {},
    "activation, compensated": {"score": "activation"},
    "activation": {"score": "activation", "compensate": False},
    "magnitude": {"score": "magnitude", "compensate": False},
    "random": {"score": "random", "compensate": False},
}
"""For layers, activation is Block Influence: one minus the cosine of a layer's input and output."""


def main(
    data: Annotated[Path, typer.Option(help="The folder of the texts.")],
    model: Annotated[str, typer.Option(help="By name or folder.")] = "smollm2-135m",
    dtype: Annotated[str, typer.Option(help="The model's dtype.")] = "bfloat16",
    tokens: Annotated[int, typer.Option(help="Of calibration text.")] = 16_384,
    test: Annotated[int, typer.Option(help="Tokens of each test text.")] = 6_144,
    part: Annotated[str, typer.Option(help="channels, heads or layers.")] = "channels",
    share: Annotated[list[float] | None, typer.Option(help="Of the part; repeatable.")] = None,
    others: Annotated[bool, typer.Option(help="Torch-Pruning alone, beside what is kept.")] = False,
) -> None:
    """Print the table and write the result."""
    torch.set_num_threads(1)
    console = Console(highlight=False)
    loaded, tokenizer = load(model, dtype=dtype)
    loaded.requires_grad_(False)
    fitted = [
        *pieces(data / "gsm8k-train.jsonl.gz", tokenizer, tokens // 2),
        *pieces(data / "wikitext2-valid.txt.gz", tokenizer, tokens // 2),
    ]
    tests = {
        "gsm8k": pieces(data / "gsm8k-test.jsonl.gz", tokenizer, test),
        "wikitext2": pieces(data / "wikitext2-test.txt.gz", tokenizer, test),
    }
    whole = {name: perplexity(loaded, batches) for name, batches in tests.items()}
    figures: dict[str, Any] = {"model": Path(model).name, "dtype": dtype, "tokens": tokens}
    figures |= {"test tokens": test, "whole": whole, "part": part, "shares": {}}
    name = "structure_prune" if part == "channels" else f"structure_prune_{part}"
    result = result_name(name, model)
    if others:
        figures = json.loads((RESULTS / f"{result}.json").read_text())["figures"]
        figures.setdefault("part", part)
    for removed in share or SHARES[part]:
        own = figures["shares"].setdefault(f"{removed:.3g}", {})
        if part == "channels" and torch_pruning_control.is_installed():
            for importance in torch_pruning_control.IMPORTANCES:
                smaller = torch_pruning_control.without_channels(
                    loaded, removed, importance, fitted
                )
                ratios = {t: perplexity(smaller, b) / whole[t] for t, b in tests.items()}
                own[f"torch-pruning, {importance}"] = {"ratio": ratios}
                console.print(f"{removed:.0%} of {part}, torch-pruning, {importance}: {ratios}")
        for way, options in ({} if others else WAYS).items():
            start = time.process_time()
            pruned = prune(loaded, fitted, PruneConfig(**{part: removed}, **options))
            seconds = time.process_time() - start
            ratios = {t: perplexity(loaded, batches) / whole[t] for t, batches in tests.items()}
            own[way] = {"ratio": ratios, "CPU seconds": round(seconds, 1)}
            pruned.detach()
            console.print(f"{removed:.0%} of {part}, {way}: {ratios}, {seconds:.0f} s")
    draw(figures).draw(console)
    command = f"{COMMAND} --model {Path(model).name} --part {part}"
    keep(result, figures, command)


COMMAND = "python -m benchmarks.structure_prune --data FOLDER"


def pieces(path: Path, tokenizer: Any, tokens: int) -> list[dict[str, torch.Tensor]]:
    """So many tokens from the start of a text, in batches of rows of equal length."""
    ids = tokenizer(text_of(path)[: 12 * tokens], verbose=False)["input_ids"][:tokens]
    rows_BT = torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)
    return [{"input_ids": batch} for batch in rows_BT.split(ROWS)]


def text_of(path: Path) -> str:
    """The whole text of a file, questions and answers joined."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        text = file.read()
    if ".jsonl" not in path.name:
        return text
    rows = [json.loads(line) for line in text.splitlines()]
    return "\n\n".join(f"{row['question']}\n{row['answer']}" for row in rows)


def draw(figures: dict[str, Any]) -> Table:
    names = list(figures["whole"])
    rows = [
        [share, way, *(f"{result['ratio'][name]:.3f}" for name in names)]
        for share, ways in figures["shares"].items()
        for way, result in ways.items()
    ]
    head = [f"{figures['part']} removed", "way", *names]
    title = f"{figures['model']}: perplexity, relative to the whole model's"
    return Table(title, head, rows, right=frozenset(names))


if __name__ == "__main__":
    typer.run(main)
