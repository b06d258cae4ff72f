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
from dataclasses import dataclass
from functools import cached_property
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
PLANS = {"of the heads of each layer": True, "of all heads": False}
WEIGHTS = {"new weights": True, "old weights": False}


def main(
    data: Annotated[Path, typer.Option(help="The folder of the texts.")],
    steps: Annotated[int, typer.Option(help="Of training.")] = 900,
    tokens: Annotated[int, typer.Option(help="Of calibration text.")] = 4_096,
    test: Annotated[int, typer.Option(help="Tokens of each test text.")] = 4_096,
) -> None:
    """Print the tables and write the result after each way."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    untrained = LlamaForCausalLM(LlamaConfig(**SIZES))
    model, seconds = trained("structure_heads", untrained, data, steps)
    figures: dict[str, Any] = {"sizes": SIZES, "steps": steps, "training CPU seconds": seconds}
    figures |= {"calibration tokens": tokens, "test tokens": test, "models": {}}
    own, tokenizer = load("nano-l")
    materials = {
        "byte Llama": Material(model, calibration_pieces(data, tokens), test_pieces(data, test)),
        "nano-l": Material(
            own.requires_grad_(False),
            nano_pieces("train", tokenizer, tokens),
            {"questions": nano_pieces("test", tokenizer, 2 * test)},
        ),
    }
    for weights, plan, name, share in product(WEIGHTS, PLANS, materials, SHARES):
        result = figures["models"].setdefault(name, {"whole": materials[name].whole, "ways": {}})
        ratios = materials[name].ratios(share, PLANS[plan], WEIGHTS[weights])
        result["ways"].setdefault(f"{share:.0%} {plan}", {})[weights] = ratios
        keep("structure_heads", figures, COMMAND)
    for name, result in figures["models"].items():
        for table in draw(name, result["ways"]):
            table.draw(Console(highlight=False))


COMMAND = "python -m benchmarks.structure_heads --data FOLDER"


def nano_pieces(split: Any, tokenizer: Any, tokens: int) -> list[dict[str, torch.Tensor]]:
    rows = nano.conversations(split, QUESTIONS)
    return calibration_batches(rows, tokenizer, tokens=tokens, length=PIECE)


@dataclass(frozen=True, eq=False)
class Material:
    """A model, and the texts that it is pruned with and measured on."""

    model: Any
    fitted: list[dict[str, torch.Tensor]]
    tests: dict[str, list[dict[str, torch.Tensor]]]

    @cached_property
    def whole(self) -> dict[str, float]:
        return {name: perplexity(self.model, batches) for name, batches in self.tests.items()}

    @cached_property
    def scores(self) -> dict[str, Importance]:
        """Those that are measured on the whole model, once."""
        return {
            score: importance(self.model, self.fitted, ImportanceConfig(("heads",), score))
            for score in ("fisher", "taylor", "leave_one_out", "entropy")
        }

    def ratios(self, share: float, uniform: bool, compensate: bool) -> dict[str, dict[str, float]]:
        """Every score's perplexities, relative to the whole model's."""
        ratios: dict[str, dict[str, float]] = {}
        for score in SCORES:
            for seed in range(SEEDS if score == "random" else 1):
                how: dict[str, Any] = {"uniform": uniform, "compensate": compensate, "seed": seed}
                config = PruneConfig(heads=share, score=score, **how)
                name = f"random, seed {seed}" if score == "random" else score
                ratios[name] = self._without(config)
                print(f"{config}: {ratios[name]}", flush=True)
        return ratios

    def _without(self, config: PruneConfig) -> dict[str, float]:
        pruned = prune(self.model, self.fitted, config, scores=self.scores.get(config.score))
        ratios = {t: perplexity(self.model, b) / self.whole[t] for t, b in self.tests.items()}
        pruned.detach()
        return ratios


# --- tables --------------------------------------------------------------------------------------


def draw(model: str, ways: dict[str, Any]) -> Iterator[Table]:
    """One for each share and plan, in which the figures of several texts are averaged."""
    for way, weights in ways.items():
        columns = {name: by_score(ratios) for name, ratios in weights.items()}
        scores = list(next(iter(columns.values())))
        rows = [[score, *(f"{c[score]:.3f}" for c in columns.values())] for score in scores]
        title = f"{model}, perplexity without {way}, relative to all"
        yield Table(title, ["score", *columns], rows, right=frozenset(columns))


def by_score(ratios: dict[str, dict[str, float]]) -> dict[str, float]:
    """The geometric mean over texts, and the mean and the best of the random draws."""
    means = {way: geometric_mean(own.values()) for way, own in ratios.items()}
    drawn = [mean for way, mean in means.items() if way.startswith("random")]
    named = {way: mean for way, mean in means.items() if not way.startswith("random")}
    return named | {"random, mean": geometric_mean(drawn), "random, best": min(drawn)}


if __name__ == "__main__":
    typer.run(main)
