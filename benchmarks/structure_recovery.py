"""How much of what pruning lost training brings back, by what is trained and who teaches.

    python -m benchmarks.structure_recovery                               # nano-l
    python -m benchmarks.structure_recovery --model smollm2-135m --data FOLDER

A quarter of all parameters is removed (MLP channels, compensated), and every way trains the same
smaller model for the same number of steps on the same batches. The control is the whole model with
the same extra training, for text that the model has not seen in this form makes any model better.
Shares are of log-perplexity on test text: 1 is all that pruning lost.

The real model's FOLDER is that of `benchmarks.structure_prune`: it is trained on as much of GSM8K's
training set as of WikiText-2's validation set, and measured on both test sets. nano-l is trained on
new questions of its world and measured on its test questions, whose answers are checked as well.

Each way is a training run under `--work`, so the same command goes on where it was interrupted.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks.harness import CACHE, keep
from benchmarks.real_model import result_name
from benchmarks.structure_prune import pieces
from pliant import nano
from pliant.data.collate import Collator
from pliant.loading import load
from pliant.reports.tables import Table
from pliant.structure import PruneConfig, export, perplexity, prune
from pliant.structure.pruning.costs import costs_of
from pliant.structure.recovery import RecoveryConfig, RecoveryResult, recover
from pliant.training.texts import Texts, texts

BUDGET = 0.25
DISTILL = 0.5
NONE, CONTROL = "no training", "the whole model, trained"
WAYS = {
    f"{train}{', distilled' if distill else ''}": RecoveryConfig(train, distill=distill)  # type: ignore[arg-type]
    for train in ("lora", "norms", "all")
    for distill in (0.0, DISTILL)
}
QUESTIONS, ASKED = 32_000, 6_000
"""Of nano-l's world: to train on, and to measure with."""
LENGTH = 512
CALIBRATION, TEST = 16_384, 6_144
"""Tokens of the real model's texts: of both together, and of each."""
TRAINED_ON = 280_000
"""Tokens of each of its texts to draw from: WikiText-2's validation set has no more."""


@dataclass(frozen=True, eq=False)
class Material:
    """A model, and the texts that it is pruned with, trained on and measured on."""

    name: str
    dtype: str
    model: Any
    tokenizer: Any
    calibration: list[Any]
    train: Texts
    tests: dict[str, list[Any]]
    """Batches by name."""
    steps: int
    batch: int
    rates: dict[str, float] = field(default_factory=dict)

    def settings(self, train: str) -> dict[str, str]:
        own = {"learning_rate": str(self.rates[train])} if train in self.rates else {}
        return own | {
            "max_steps": str(self.steps),
            "per_device_train_batch_size": str(self.batch),
            "save_steps": str(max(20, self.steps // 10)),
            "use_cpu": "true",
        }

    def measure(self, model: Any) -> dict[str, float]:
        """Losses on the test texts, and the share of right answers where there are any."""
        measured = {n: math.log(perplexity(model, batches)) for n, batches in self.tests.items()}
        if self.name in nano.NAMES:
            questions = nano.questions("test", ASKED)
            answers = nano.ask(model.eval(), self.tokenizer, [q.prompt for q in questions])
            right = [q.check(a) for q, a in zip(questions, answers, strict=True)]
            measured["accuracy"] = mean(right)
        return measured


def main(
    model: Annotated[str, typer.Option(help="nano-l, or a real model by name.")] = "nano-l",
    data: Annotated[Path | None, typer.Option(help="The folder of a real model's texts.")] = None,
    way: Annotated[list[str] | None, typer.Option(help="Only these; repeatable.")] = None,
    steps: Annotated[int | None, typer.Option(help="Of training, instead of the usual.")] = None,
    work: Annotated[Path, typer.Option(help="For the runs.")] = CACHE / "structure_recovery",
) -> None:
    """Print the table and write the result after each way."""
    torch.set_num_threads(1)
    console = Console(highlight=False)
    own = material(model, data, steps)
    folder = work / f"{Path(model).name}-{own.steps}"
    figures = prepared(own, folder)
    for name in [*(way or WAYS), CONTROL]:
        config = WAYS["all"] if name == CONTROL else WAYS[name]
        figures["ways"][name], result = trained(own, folder, name, config)
        console.print(f"{name}: {result}")
        keep(result_name("structure_recovery", own.name), figures, f"{COMMAND} --model {own.name}")
    draw(figures).draw(console)


COMMAND = "python -m benchmarks.structure_recovery"


def material(name: str, data: Path | None, steps: int | None) -> Material:
    if name in nano.NAMES:
        model, tokenizer = load(name)
        rows = nano.conversations("train", QUESTIONS, seed=1)
        tests = texts(nano.conversations("test", ASKED), tokenizer, LENGTH)
        train = texts(rows, tokenizer, LENGTH)
        calibration = batches(Texts(train.pieces[:1024]), tokenizer, 64)
        measured = {"test questions": batches(tests, tokenizer, 64)}
        own = (name, "float32", model, tokenizer, calibration, train, measured)
        return Material(*own, steps=steps or NANO_STEPS, batch=64, rates=NANO_RATES)
    if data is None:
        raise typer.BadParameter("a real model needs --data FOLDER")
    model, tokenizer = load(name, dtype="bfloat16")
    calibration = [
        *pieces(data / "gsm8k-train.jsonl.gz", tokenizer, CALIBRATION // 2),
        *pieces(data / "wikitext2-valid.txt.gz", tokenizer, CALIBRATION // 2),
    ]
    measured = {
        "gsm8k": pieces(data / "gsm8k-test.jsonl.gz", tokenizer, TEST),
        "wikitext2": pieces(data / "wikitext2-test.txt.gz", tokenizer, TEST),
    }
    rows = [
        {"input_ids": ids, "labels": ids}
        for file in ("gsm8k-train.jsonl.gz", "wikitext2-valid.txt.gz")
        for batch in pieces(data / file, tokenizer, TRAINED_ON)
        for ids in batch["input_ids"].tolist()
    ]
    own = (Path(name).name, "bfloat16", model, tokenizer, calibration, Texts(rows), measured)
    return Material(*own, steps=steps or REAL_STEPS, batch=4)


NANO_STEPS, REAL_STEPS = 500, 100
NANO_RATES = {"lora": 2e-3, "norms": 3e-3, "all": 3e-4}


def batches(own: Texts, tokenizer: Any, rows: int) -> list[Any]:
    collate = Collator.of(tokenizer)
    starts = range(0, len(own.pieces), rows)
    return [collate(own.pieces[start : start + rows]) for start in starts]


def prepared(own: Material, folder: Path) -> dict[str, Any]:
    """The smaller model in its folder, and the figures of both models before any training."""
    costs = costs_of(own.model, ["channels"])
    config = PruneConfig(channels=BUDGET * costs.whole / costs.parts["channels"])
    if not (folder / "smaller").is_dir():
        pruned = prune(own.model, own.calibration, config)
        export(own.model, folder / "smaller", own.tokenizer)
        pruned.detach()
    smaller, _ = load(str(folder / "smaller"), dtype=own.dtype)
    sizes = [sum(p.numel() for p in m.parameters()) for m in (own.model, smaller)]
    ways = {NONE: {"measured": own.measure(smaller)}}
    return {
        "model": own.name,
        "dtype": own.dtype,
        "parameters": {"whole": sizes[0], "smaller": sizes[1]},
        "channels removed": config.channels,
        "steps": own.steps,
        "tokens a step": round(own.train.tokens / len(own.train.pieces) * own.batch),
        "whole": own.measure(own.model),
        "ways": ways,
    }


def trained(
    own: Material, folder: Path, name: str, config: RecoveryConfig
) -> tuple[dict[str, Any], RecoveryResult]:
    """One way, from where its run was interrupted."""
    source = own.name if name == CONTROL else str(folder / "smaller")
    model, _ = load(source, dtype=own.dtype)
    begun = time.process_time()
    result = recover(
        model,
        own.tokenizer,
        own.train,
        folder / name.replace(", ", "-").replace(" ", "-"),
        config,
        teacher=own.model if config.distill else None,
        resume=True,
        held_out=_test_pieces(own),
        settings=own.settings(config.train),
    )
    return {
        "measured": own.measure(model),
        "trained": result.trained,
        "CPU seconds": round(time.process_time() - begun),
        "resumed at": result.resumed_at,
        "settings": config.settings(own.settings(config.train)),
        "distill": config.distill,
    }, result


def _test_pieces(own: Material) -> Texts:
    """A few, for the run's own report."""
    few = [batch for test in own.tests.values() for batch in test[:1]]
    return Texts(
        [
            {"input_ids": ids[mask.bool()].tolist(), "labels": labels[mask.bool()].tolist()}
            for batch in few
            for ids, labels, mask in zip(*(_column(batch, name) for name in COLUMNS), strict=True)
        ]
    )


COLUMNS = ("input_ids", "labels", "attention_mask")


def _column(batch: Any, name: str) -> torch.Tensor:
    ids: torch.Tensor = batch["input_ids"]
    other = torch.ones_like(ids) if name == "attention_mask" else ids
    column: torch.Tensor = batch.get(name, other)
    return column


def draw(figures: dict[str, Any]) -> Table:
    """How much of what was lost is back: of the whole model as it is, and as it is trained."""
    whole, ways = figures["whole"], figures["ways"]
    before, control = ways[NONE]["measured"], ways[CONTROL]["measured"]
    names = list(whole)
    rows = [["the whole model", *(f"{whole[n]:.4f}" for n in names), "", "", ""]]
    for way, figure in ways.items():
        after = figure["measured"]
        shares = (
            ["", ""]
            if way in (NONE, CONTROL)
            else [f"{share_back(before, after, goal):.0%}" for goal in (whole, control)]
        )
        seconds = f"{figure['CPU seconds']:,}" if "CPU seconds" in figure else ""
        rows.append([way, *(f"{after[n]:.4f}" for n in names), *shares, seconds])
    head = ["way", *names, "back", "back, of the trained", "CPU s"]
    title = f"{figures['model']}: a quarter of the parameters removed, {figures['steps']} steps"
    return Table(title, head, rows, right=frozenset(head[1:]))


def share_back(before: dict[str, float], after: dict[str, float], goal: dict[str, float]) -> float:
    """Of the log-perplexity lost, on all texts together."""
    names = [name for name in goal if name != "accuracy"]
    lost = sum(before[n] - goal[n] for n in names)
    return sum(before[n] - after[n] for n in names) / lost


if __name__ == "__main__":
    typer.run(main)
