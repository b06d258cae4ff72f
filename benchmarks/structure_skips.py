"""What U-Net skips are worth: a model trained on with skips, beside the same training without.

    python -m benchmarks.structure_skips [--seeds 3]

The embedded models train on questions with their answers, on the same batches: as they are, with
skips whose scales are 0 at first (additive and linear), and with the skips alone trained. A seed is
one order of training questions. Losses are of the answers to other questions, in nats per token.
"""

from __future__ import annotations

from statistics import mean
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks.harness import keep
from benchmarks.nano_answers import answer_batches, answer_loss
from pliant import nano
from pliant.reports.tables import Table
from pliant.stats import bootstrap
from pliant.structure import SkipConfig, attach_skips

ROWS = 8
CONTROL = "no skips"
WAYS: dict[str, SkipConfig | None] = {
    CONTROL: None,
    "scale": SkipConfig("scale"),
    "linear": SkipConfig("linear"),
    "scale, skips alone": SkipConfig("scale"),
    "linear, skips alone": SkipConfig("linear"),
}


def main(
    seeds: Annotated[int, typer.Option(help="Orders of the training questions.")] = 3,
    steps: Annotated[int, typer.Option(help="Of training.")] = 80,
    rate: Annotated[float, typer.Option(help="The learning rate of the model.")] = 1e-3,
    skip_rate: Annotated[float, typer.Option(help="The learning rate of the skips.")] = 1e-3,
) -> None:
    """Print the table and write the result."""
    torch.set_num_threads(1)
    settings = {"steps": steps, "rows": ROWS, "rate": rate, "skip_rate": skip_rate}
    figures: dict[str, Any] = {"settings": settings, "models": {}}
    for name in nano.NAMES:
        losses: dict[str, list[float]] = {way: [] for way in WAYS}
        for seed in range(seeds):
            for way in WAYS:
                losses[way].append(trained(name, way, seed, steps, rate, skip_rate))
        model, tokenizer = nano.load(name)
        before = answer_loss(model, list(answer_batches(tokenizer, "dev", 2, 64)))
        beside = {way: difference(losses[way], losses[CONTROL]) for way in WAYS if way != CONTROL}
        figures["models"][name] = {"before": before, "losses": losses, "beside": beside}
        command = f"python -m benchmarks.structure_skips --seeds {seeds}"
        keep("structure_skips", figures, command)
    draw(figures).draw(Console(highlight=False))


def trained(name: str, way: str, seed: int, steps: int, rate: float, skip_rate: float) -> float:
    """The loss on other questions after the training."""
    model, tokenizer = nano.load(name)
    groups = []
    if not way.endswith("alone"):
        groups.append({"params": list(model.parameters()), "lr": rate})
    else:
        model.requires_grad_(False)
    config = WAYS[way]
    if config is not None:
        skips = attach_skips(model, config)
        groups.append({"params": list(skips.parameters()), "lr": skip_rate, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups, lr=rate)
    model.train()
    for batch in answer_batches(tokenizer, "train", steps, ROWS, seed=100 + seed):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return answer_loss(model, list(answer_batches(tokenizer, "dev", 2, 64)))


def difference(losses: list[float], controls: list[float]) -> dict[str, Any]:
    """With skips minus without, in pairs."""
    each = [a - b for a, b in zip(losses, controls, strict=True)]
    return bootstrap(lambda rows: mean(each[i] for i in rows), len(each)).as_dict()


def draw(figures: dict[str, Any]) -> Table:
    rows = []
    for name, own in figures["models"].items():
        rows.append([name, "before training", f"{own['before']:.4f}", ""])
        for way, losses in own["losses"].items():
            band = own["beside"].get(way)
            beside = "" if band is None else "{value:+.4f} [{low:+.4f}, {high:+.4f}]".format(**band)
            rows.append([name, way, f"{mean(losses):.4f}", beside])
    head = ["model", "way", "held-out loss", "beside no skips"]
    return Table("U-Net skips: held-out loss after the training", head, rows)


if __name__ == "__main__":
    typer.run(main)
