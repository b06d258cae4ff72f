"""Labels in which the strong model was not asked every prompt: what do the incomplete rows add?

    python -m benchmarks.missing_labels --data FOLDER

MMLU, Mixtral-8x7B or GPT-4 (see routing_labels.py). Of a sample of the training half the grades of
GPT-4 are removed in two ways: a third of them at random, or more often where Mixtral was right, as
for somebody who asks the expensive model when the cheap one fails. A scorer is fitted on the
complete rows alone; on all rows, with the missing grades imputed; and on all labels, the most that
imputing could reach. The test half is complete.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console

from benchmarks.harness import keep
from benchmarks.routing_labels import halves, read
from pliant.reports.tables import Table
from pliant.routing.metrics.ranking import apgr
from pliant.routing.outcomes import Outcomes
from pliant.routing.scorers import make
from pliant.routing.scorers.imputing import imputed
from pliant.stats import brier

KINDS = ("text", "text+group")
WAYS = ("complete rows", "imputed", "all labels")
NOT_ASKED = {
    "a third, at random": (1 / 3, 1 / 3),
    "mostly where the weak model is right": (0.1, 0.7),
}
"""The chance that the strong model was not asked, where the weak one is wrong and where right."""


def main(
    data: Annotated[Path, typer.Option(help="The folder of the label sets.")],
    labels: Annotated[int, typer.Option(help="Of the training half.")] = 1500,
    seeds: Annotated[int, typer.Option(help="Splits.", min=2)] = 8,
) -> None:
    """Print the table and write the result."""
    outcomes = read(data, "mmlu")
    figures: dict[str, Any] = {"labels": labels, "splits": seeds}
    for name, chances in NOT_ASKED.items():
        figures[name] = {
            kind: summary([measure(outcomes, kind, chances, labels, seed) for seed in range(seeds)])
            for kind in KINDS
        }
    draw(figures).draw(Console(highlight=False))
    keep("missing_labels", figures, "python -m benchmarks.missing_labels --data FOLDER")


def measure(
    outcomes: Outcomes, kind: str, chances: tuple[float, float], labels: int, seed: int
) -> dict[str, tuple[float, float]]:
    """APGR, and the Brier score of the strong model's probability, of each way on one split."""
    train, test = (outcomes.select(rows) for rows in halves(outcomes, seed))
    rng = np.random.default_rng(seed)
    train = train.select(rng.permutation(len(train))[:labels])
    right = train.right.copy()
    right[rng.random(labels) < np.where(train.weak > 0.5, chances[1], chances[0]), 1] = np.nan
    partial = replace(train, right=right)
    tables = (partial.select(partial.complete), imputed(partial, seed), train)
    results = {}
    for way, table in zip(WAYS, tables, strict=True):
        fitted, choice = table.split((0.8, 0.2), seed)
        predicted = make(kind).fit(fitted, choice, seed).predict(test.prompts, test.groups)
        assert predicted.right is not None
        error = brier(predicted.right[:, 1], test.strong)
        results[way] = apgr(predicted.last_gain, test), error
    return results


def summary(splits: list[dict[str, tuple[float, float]]]) -> dict[str, dict[str, float]]:
    """The means, and how much more APGR than on the complete rows, with its standard error over
    splits."""

    def of(way: str, at: int) -> NDArray[np.float64]:
        return np.array([split[way][at] for split in splits])

    result = {}
    for way in WAYS:
        more = of(way, 0) - of(WAYS[0], 0)
        result[way] = {
            "apgr": float(of(way, 0).mean()),
            "more": float(more.mean()),
            "standard error": float(more.std(ddof=1) / len(more) ** 0.5),
            "brier": float(of(way, 1).mean()),
        }
    return result


def draw(figures: dict[str, Any]) -> Table:
    rows = [
        [
            name,
            kind,
            way,
            f"{result['apgr']:.3f}",
            f"{result['more']:+.3f} ± {result['standard error']:.3f}",
            f"{result['brier']:.4f}",
        ]
        for name in NOT_ASKED
        for kind in KINDS
        for way, result in figures[name][kind].items()
    ]
    head = ["not asked", "scorer", "trained on", "APGR", "more than on complete rows", "Brier"]
    title = f"MMLU, {figures['labels']:,} labels, {figures['splits']} splits"
    return Table(title, head, rows, right=frozenset(head[3:]))


if __name__ == "__main__":
    typer.run(main)
