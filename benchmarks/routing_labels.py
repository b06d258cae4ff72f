"""Routing on real labels: Mixtral-8x7B or GPT-4, on MMLU and GSM8K, from the text alone.

    python -m benchmarks.routing_labels --data FOLDER

The folder holds `mmlu-mixtral8x7b-gpt4.jsonl.gz` and `gsm8k-mixtral8x7b-gpt4.jsonl.gz`: the
evaluation responses of the RouteLLM repository, as rows of prompt, group, weak and strong. Each of
five seeds divides a set into halves. The small set, GSM8K, has four times as many splits, and each
half is the training half once, which averages out the differences between splits. All choices are
made within the training half (on a fifth of it), the test half is only measured, and equal prompts
stay in one half. Fixed beforehand: the penalties of `pair`, chosen on MMLU (scorers/text.py),
so that GSM8K is new to them and MMLU's halves are not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console

from benchmarks.harness import keep
from pliant.data import duplicates, normalised, splits
from pliant.reports.tables import Table
from pliant.routing.metrics.curves import Ranking
from pliant.routing.metrics.ranking import METRICS, apgr, oracle_apgr, within_group_apgr
from pliant.routing.outcomes import Outcomes
from pliant.routing.scorers import make
from pliant.stats import Band, bootstrap_counts

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]

SETS = ("mmlu", "gsm8k")
# GSM8K has one group, so scorers that use the group learn nothing from it.
KINDS = {
    "mmlu": ("random", "length", "tfidf", "knn", "group", "pair", "text", "text+group"),
    "gsm8k": ("random", "length", "tfidf", "knn", "pair", "text"),
}
# Both halves are the test half once, in more splits, because 660 prompts are few.
TWICE, MORE = ("gsm8k",), 4
TRANSFERRED = ("length", "tfidf", "pair", "text")
# RouteLLM's best router, as published: trained on other labels, so not directly comparable.
PUBLISHED = {"mmlu": 0.603, "gsm8k": 0.622}


def main(
    data: Annotated[Path, typer.Option(help="The folder of the two label sets.")],
    seeds: Annotated[int, typer.Option(help="Splits of each set.", min=1)] = 5,
) -> None:
    """Print the table and write the result."""
    console = Console(highlight=False)
    tables = {name: read(data, name) for name in SETS}
    figures: dict[str, Any] = {"published": PUBLISHED}
    for name in SETS:
        figures[name] = measure(
            tables[name],
            KINDS[name],
            seeds * MORE if name in TWICE else seeds,
            name in TWICE,
            console,
        )
        draw(figures[name], name).draw(console)
    figures["transfer"] = transfer(tables)
    draw_transfer(figures["transfer"]).draw(console)
    console.print("* trained on other labels, so not directly comparable")
    keep("routing_labels", figures, "python -m benchmarks.routing_labels --data FOLDER")


def read(data: Path, name: str) -> Outcomes:
    return Outcomes.read(data / f"{name}-mixtral8x7b-gpt4.jsonl.gz", models=("weak", "strong"))


def measure(
    outcomes: Outcomes, kinds: tuple[str, ...], seeds: int, twice: bool, console: Console
) -> dict[str, Any]:
    """Every scorer on every split."""
    predictions: dict[str, list[Floats]] = {kind: [] for kind in kinds}
    tests: list[Rows] = []
    for seed in range(seeds):
        first, second = halves(outcomes, seed)
        for train, test in ((first, second), (second, first))[: 2 if twice else 1]:
            tests.append(test)
            for kind in kinds:
                predictions[kind].append(
                    gains(kind, outcomes.select(train), outcomes.select(test), seed)
                )
        console.print(f"split {seed + 1} of {seeds} done", style="dim")
    return {
        "prompts": len(outcomes),
        "right": dict(zip(("Mixtral-8x7B", "GPT-4"), outcomes.right.mean(axis=0), strict=True)),
        "oracle": oracle_apgr(outcomes),
        "scorers": {kind: summary(predictions[kind], tests, outcomes) for kind in kinds},
        "more than length": {
            kind: more(predictions[kind], predictions["length"], tests, outcomes).as_dict()
            for kind in kinds
            if kind not in ("length", "random")
        },
    }


def halves(outcomes: Outcomes, seed: int) -> tuple[Rows, Rows]:
    """The rows of two halves; equal prompts stay in one of them."""
    keys = [normalised(text) for text in outcomes.prompts]
    train, test = splits(len(outcomes), (0.5, 0.5), seed, keys)
    return np.asarray(train), np.asarray(test)


def gains(kind: str, train: Outcomes, test: Outcomes, seed: int) -> Floats:
    """The gains that a scorer of the training half predicts on the test half."""
    assert not duplicates(train.prompts, test.prompts)
    fitted, choice = train.split((0.8, 0.2), seed)
    scorer = make(kind).fit(fitted, choice, seed)
    return scorer.predict(test.prompts, test.groups).last_gain


def summary(predictions: list[Floats], tests: list[Rows], outcomes: Outcomes) -> dict[str, Any]:
    held = [outcomes.select(test) for test in tests]
    by_half = [apgr(gain, part) for gain, part in zip(predictions, held, strict=True)]
    result = {"apgr": float(np.mean(by_half)), "by half": by_half}
    if len(set(outcomes.groups or ())) > 1:
        inside = [
            within_group_apgr(gain, part) for gain, part in zip(predictions, held, strict=True)
        ]
        result["within groups"] = float(np.mean(inside))
    return result


def more(a: list[Floats], b: list[Floats], tests: list[Rows], outcomes: Outcomes) -> Band:
    """APGR of a less that of b, averaged over the splits; each resample serves all splits."""
    pairs = [
        (test, *(Ranking.of(gain, outcomes.select(test)) for gain in both))
        for test, *both in zip(tests, a, b, strict=True)
    ]
    measure = METRICS["apgr"]

    def difference(counts: Floats) -> Floats:
        values = [
            measure(ours, counts[:, test]) - measure(theirs, counts[:, test])
            for test, ours, theirs in pairs
        ]
        return np.asarray(np.mean(values, axis=0))

    return bootstrap_counts(difference, len(outcomes))


def transfer(tables: dict[str, Outcomes]) -> dict[str, dict[str, float]]:
    """Fitted on all of one set, measured on all of the other."""
    values: dict[str, dict[str, float]] = {}
    for source, target in (SETS, SETS[::-1]):
        test = tables[target]
        values[f"{source} to {target}"] = {
            kind: apgr(gains(kind, tables[source], test, 0), test) for kind in TRANSFERRED
        }
    return values


def draw(figures: dict[str, Any], name: str) -> Table:
    """One line for each scorer, in the order of APGR, with the upper limit and published values."""
    rows = []
    for kind, result in sorted(figures["scorers"].items(), key=lambda item: -item[1]["apgr"]):
        over = figures["more than length"].get(kind)
        band = f"{over['value']:+.3f} [{over['low']:+.3f}, {over['high']:+.3f}]" if over else "-"
        spread = np.std(result["by half"])
        inside = f"{result['within groups']:.3f}" if "within groups" in result else "-"
        rows.append([kind, f"{result['apgr']:.3f}", f"{spread:.3f}", inside, band])
    rows.append(["oracle", f"{figures['oracle']:.3f}", "-", "-", "-"])
    rows.append(["RouteLLM, as published *", f"{PUBLISHED[name]:.3f}", "-", "-", "-"])
    head = ["scorer", "APGR", "spread", "within groups", "more than length (95 %)"]
    title = f"{name}: {figures['prompts']:,} prompts, {seeds_of(figures)} test halves"
    return Table(title, head, rows, right=frozenset(head[1:]))


def seeds_of(figures: dict[str, Any]) -> int:
    return len(figures["scorers"]["random"]["by half"])


def draw_transfer(figures: dict[str, dict[str, float]]) -> Table:
    rows = [
        [way, *(f"{values[kind]:.3f}" for kind in TRANSFERRED)] for way, values in figures.items()
    ]
    return Table("APGR on another label set", ["from, to", *TRANSFERRED], rows)


if __name__ == "__main__":
    typer.run(main)
