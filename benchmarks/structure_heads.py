"""Perplexity after a quarter and half of a model's heads are removed, before any further training.

    python -m benchmarks.structure_heads --data FOLDER

Two models: a byte-level Llama, trained on GSM8K and WikiText-2 for some CPU-minutes, and nano-l,
whose heads are few. FOLDER is that of `benchmarks.structure_prune`. Calibration text is from the
training text; perplexity is measured on test text, relative to the whole model's.

Every score chooses heads with new weights for the output projections and without, and with the same
number of heads from every layer, as a stock checkpoint needs, and with another. `prune` by default
is the score "error", with new weights, the same number everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from statistics import geometric_mean
from typing import Annotated, Any, get_args

import torch
import typer
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.byte_models import LENGTH, calibration_pieces, test_pieces, trained
from benchmarks.harness import keep
from pliant import nano
from pliant.loading import load
from pliant.reports.tables import Table
from pliant.structure import (
    Importance,
    ImportanceConfig,
    PruneConfig,
    calibration_batches,
    importance,
    perplexity,
    prune,
)
from pliant.structure.config import PruneScore

SHARES = (0.25, 0.5)
SCORES: tuple[PruneScore, ...] = get_args(PruneScore)
SEEDS = 3  # of the score "random"
QUESTIONS, PIECE = 2_000, 96  # of nano's world, and tokens of each
SIZES = {
    "vocab_size": 256,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "head_dim": 16,
    "max_position_embeddings": LENGTH,
    "tie_word_embeddings": True,
}
PLANS = {"the same share of each layer": True, "another share of each layer": False}
WEIGHTS = {"new weights": True, "old weights": False}


def main(
    data: Annotated[Path, typer.Option(help="The folder of the texts.")],
    steps: Annotated[int, typer.Option(help="Of training.")] = 900,
    tokens: Annotated[int, typer.Option(help="Of calibration text.")] = 4_096,
    test: Annotated[int, typer.Option(help="Tokens of each test text.")] = 8_192,
) -> None:
    """Print the tables and write the result after each model."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    untrained = LlamaForCausalLM(LlamaConfig(**SIZES))
    model, seconds = trained("structure_heads", untrained, data, steps)
    figures: dict[str, Any] = {"sizes": SIZES, "steps": steps, "training CPU seconds": seconds}
    figures |= {"calibration tokens": tokens, "random seeds": SEEDS, "models": {}}
    texts = calibration_pieces(data, tokens), test_pieces(data, test)
    figures["models"]["byte Llama"] = measured(model, *texts)
    keep("structure_heads", figures, COMMAND)
    own, tokenizer = load("nano-l")
    own.requires_grad_(False)
    figures["models"]["nano-l"] = measured(own, *nano_texts(tokenizer, tokens, test))
    keep("structure_heads", figures, COMMAND)
    for name, result in figures["models"].items():
        for table in draw(name, result):
            table.draw(Console(highlight=False))


COMMAND = "python -m benchmarks.structure_heads --data FOLDER"


def nano_texts(tokenizer: Any, tokens: int, test: int) -> tuple[Any, dict[str, Any]]:
    """To choose heads on, and to measure with."""
    train, held_out = (nano.conversations(split, QUESTIONS) for split in ("train", "test"))
    fitted = calibration_batches(train, tokenizer, tokens=tokens, length=PIECE)
    tested = calibration_batches(held_out, tokenizer, tokens=test, length=PIECE)
    return fitted, {"questions": tested}


def measured(model: Any, fitted: Any, tests: dict[str, Any]) -> dict[str, Any]:
    """Every way's perplexities, relative to the whole model's."""
    whole = {name: perplexity(model, batches) for name, batches in tests.items()}
    shares: dict[str, Any] = {}
    scores: dict[str, Importance] = {}
    for score in ("fisher", "taylor", "leave_one_out", "entropy"):
        scores[score] = importance(model, fitted, ImportanceConfig(("heads",), score))
        print(scores[score], flush=True)
    for share, plan, weights in product(SHARES, PLANS, WEIGHTS):
        own = shares.setdefault(f"{share:g}", {}).setdefault(plan, {}).setdefault(weights, {})
        for config in configs(share, PLANS[plan], WEIGHTS[weights]):
            pruned = prune(model, fitted, config, scores=scores.get(config.score))
            ratios = {t: perplexity(model, own) / whole[t] for t, own in tests.items()}
            pruned.detach()
            name = f"random, seed {config.seed}" if config.score == "random" else config.score
            own[name] = {"ratio": ratios}
            print(f"{config}: {ratios}", flush=True)
    seconds = {score: round(own.cost.seconds, 1) for score, own in scores.items()}
    return {"whole": whole, "seconds of the scores": seconds, "shares": shares}


def configs(share: float, uniform: bool, compensate: bool) -> Iterator[PruneConfig]:
    for score in SCORES:
        for seed in range(SEEDS if score == "random" else 1):
            how: dict[str, Any] = {"uniform": uniform, "compensate": compensate, "seed": seed}
            yield PruneConfig(heads=share, score=score, **how)


# --- tables --------------------------------------------------------------------------------------


def draw(model: str, result: dict[str, Any]) -> Iterator[Table]:
    """One for each share and plan, in which the figures of several texts are averaged."""
    for share, plans in result["shares"].items():
        for plan, weights in plans.items():
            columns = {name: by_score(ways) for name, ways in weights.items()}
            scores = list(next(iter(columns.values())))
            rows = [[score, *(f"{c[score]:.3f}" for c in columns.values())] for score in scores]
            title = f"{model}, {float(share):.0%} of the heads, {plan}: relative perplexity"
            yield Table(title, ["score", *columns], rows, right=frozenset(columns))


def by_score(ways: dict[str, Any]) -> dict[str, float]:
    """The geometric mean over texts, and the mean and the best of the random draws."""
    means = {way: geometric_mean(own["ratio"].values()) for way, own in ways.items()}
    drawn = [mean for way, mean in means.items() if way.startswith("random")]
    named = {way: mean for way, mean in means.items() if not way.startswith("random")}
    return named | {"random, mean": geometric_mean(drawn), "random, best": min(drawn)}


if __name__ == "__main__":
    typer.run(main)
