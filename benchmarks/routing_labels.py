"""What a fit makes of labels: the selected scorer beside each single one, by number of labels.

    python -m benchmarks.routing_labels --data FOLDER [--bbh benchmarks/.cache/bbh_labels.jsonl]

The folder holds `mmlu-mixtral8x7b-gpt4.jsonl.gz` and `gsm8k-mixtral8x7b-gpt4.jsonl.gz`: the
evaluation responses of the RouteLLM repository, as rows of prompt, group, weak and strong. `nano`
are questions of the embedded world, answered by the two embedded models, and `bbh`
(benchmarks/bbh_labels.py) multiple choice of BIG-Bench Hard, by two models that are equally good.
Each of five seeds (of MMLU three) divides a set into halves; equal prompts stay in one half.
Samples of one half are the labels of a fit, and the other half (of MMLU 3,000 of it) is only
measured.

The controls, on the same labels: each scorer fitted on all of them, the prompt's length, its group,
and what `pliant route fit` selected before it cross-validated (BEFORE).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console

from benchmarks.harness import CACHE, keep
from benchmarks.routing_nano import labelled
from pliant.data import normalised, splits
from pliant.reports.tables import Table
from pliant.routing.fitting.ladder import apgr_defined, climb, select
from pliant.routing.fitting.splits import Splits, partitions
from pliant.routing.metrics.curves import Ranking
from pliant.routing.metrics.lift import aiq_of, alone_of
from pliant.routing.metrics.ranking import METRICS, apgr, within_group_apgr
from pliant.routing.outcomes import Outcomes
from pliant.routing.prompts import digest
from pliant.routing.scorers.embed import reader_of
from pliant.routing.scorers.vectors import Reader
from pliant.stats import Band, bootstrap_counts

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]

SIZES = {
    "gsm8k": (200, 500, 10_000),
    "nano": (200, 500, 2_000),
    "bbh": (200, 500, 10_000),
    "mmlu": (200, 500, 2_000, 10_000),
}
"""Labels of a fit; the last is all of the half where that has fewer."""
TEXT = ("random", "length", "group", "tfidf", "knn", "text")
WITH_ENCODER = (*TEXT, "embed", "text+embed")
SELECTED, SELECTED_WITH_ENCODER, SELECTED_WITH_GROUP = "fit", "fit --encoder", "fit --groups-known"
MOST_TESTED = 3_000
COMMAND = "python -m benchmarks.routing_labels --data FOLDER --bbh FILE"
HALVES = {"mmlu": 3}
"""Of the others, five."""
PUBLISHED = {"mmlu": 0.603, "gsm8k": 0.622}
"""RouteLLM's best router, trained on other labels, so not directly comparable."""
BEFORE: Mapping[str, Mapping[int, float]] = {
    "gsm8k": {200: 0.5932, 500: 0.6104, 10000: 0.6057},
    "mmlu": {200: 0.5877, 500: 0.6234, 2000: 0.6533},
    "nano": {200: 0.6829, 500: 0.7198, 2000: 0.7516},
}
"""APGR of what `pliant route fit` selected at commit f4f4271, which trained on 55 % of the labels
and chose on 15 %: computed there, on the same labels and test halves."""


def main(
    data: Annotated[Path, typer.Option(help="The folder of the two label sets.")],
    bbh: Annotated[Path | None, typer.Option(help="Labels of BIG-Bench Hard.")] = None,
    encoder: Annotated[str, typer.Option(help="The text encoder.")] = "minilm",
    only: Annotated[str | None, typer.Option(help="One set alone.")] = None,
) -> None:
    """Print a table for each set and write its result."""
    console = Console(highlight=False)
    for name, sizes in SIZES.items():
        if (only and name != only) or (name == "bbh" and bbh is None):
            continue
        outcomes = _labels(name, data, bbh)
        reader = remembered(encoder, name, outcomes)
        figures = measure(outcomes, sizes, HALVES.get(name, 5), reader, console)
        figures |= {"before": BEFORE.get(name, {}), "published": PUBLISHED.get(name)}
        draw(name, figures).draw(console)
        keep(f"routing_labels_{name}", figures, COMMAND)


def read(data: Path, name: str) -> Outcomes:
    return Outcomes.read(data / f"{name}-mixtral8x7b-gpt4.jsonl.gz", models=("weak", "strong"))


def _labels(name: str, data: Path, bbh: Path | None) -> Outcomes:
    if name == "bbh":
        assert bbh is not None
        return Outcomes.read(bbh)
    return labelled("test", 4_000, (0, 1), "test-seen") if name == "nano" else read(data, name)


def remembered(encoder: str, name: str, outcomes: Outcomes) -> Reader:
    """The encoder, with the embeddings of these prompts, which are computed once."""
    reader, path = reader_of(encoder), CACHE / f"embeddings-{Path(encoder).name}-{name}.npy"
    if not path.is_file():
        CACHE.mkdir(exist_ok=True)
        np.save(path, reader.compute(outcomes.asked, reader.layers)[:, 0])
    rows = zip(outcomes.asked, np.load(path), strict=True)
    reader._rows |= {digest(prompt): vector[None] for prompt, vector in rows}
    return reader


def halves(outcomes: Outcomes, seed: int) -> tuple[Rows, Rows]:
    """The rows of two halves; equal prompts stay in one of them."""
    keys = [normalised(text) for text in outcomes.prompts]
    train, test = splits(len(outcomes), (0.5, 0.5), seed, keys)
    return np.asarray(train), np.asarray(test)


def measure(
    outcomes: Outcomes, sizes: Sequence[int], seeds: int, reader: Reader, console: Console
) -> dict[str, Any]:
    """Every scorer and every selection, at each number of labels."""
    gains: dict[int, dict[str, list[Floats]]] = {size: {} for size in sizes}
    tests: list[Rows] = []
    for seed in range(seeds):
        train, test = halves(outcomes, seed)
        test = np.sort(np.random.default_rng(1).permutation(test)[:MOST_TESTED])
        tests.append(test)
        for size in sizes:
            rows = np.random.default_rng(seed).permutation(train)[:size]
            each = fitted(outcomes.select(rows), outcomes.select(test), seed, reader)
            for kind, gain in each.items():
                gains[size].setdefault(kind, []).append(gain)
        console.print(f"half {seed + 1} of {seeds} done", style="dim")
    return {
        "prompts": len(outcomes),
        "right": dict(zip(outcomes.models, outcomes.mean_right.tolist(), strict=True)),
        "metric": "APGR" if apgr_defined(outcomes) else "lift, points",
        "oracle": mean_value([outcomes.right - outcomes.right[:, :1]] * seeds, tests, outcomes),
        "sizes": {size: compared(gains[size], tests, outcomes) for size in sizes},
    }


def fitted(train: Outcomes, test: Outcomes, seed: int, reader: Reader) -> dict[str, Floats]:
    """(n, m) the gains that each scorer predicts for the test half, and the selected ones."""
    train = train.of_models(test.models)
    has_groups = len(set(train.groups or ())) > 1
    kinds = [kind for kind in WITH_ENCODER if has_groups or kind != "group"]
    parted = Splits(train, partitions(train, seed), test)
    rungs = climb(parted, kinds, None, seed, encoder=reader)
    of_text = [rung for rung in rungs if rung.kind in TEXT]
    scorers = {rung.kind: rung.scorer for rung in rungs if rung.kind != "stack"}
    scorers[SELECTED] = select(of_text, train).scorer
    scorers[SELECTED_WITH_ENCODER] = select(rungs, train).scorer
    if has_groups:
        known = climb(parted, ["text", "text+group"], None, seed, groups_known=True)
        scorers["text+group"] = next(r.scorer for r in known if r.kind == "text+group")
        scorers[SELECTED_WITH_GROUP] = select(known, train, groups_known=True).scorer
    return {kind: s.predict(test.asked, test.groups).gain for kind, s in scorers.items()}


def compared(
    gains: Mapping[str, list[Floats]], tests: list[Rows], outcomes: Outcomes
) -> dict[str, Any]:
    """Means over the halves, and the selection less its controls, paired."""
    values = {kind: mean_value(each, tests, outcomes) for kind, each in gains.items()}
    alone = [kind for kind in TEXT if kind in values and kind != "group"]
    best = max(alone, key=lambda kind: values[kind])
    both = max([*alone, "embed", "text+embed"], key=lambda kind: values[kind])
    pairs = {
        f"{SELECTED} less length": (SELECTED, "length"),
        f"{SELECTED} less {best}, the best text scorer": (SELECTED, best),
        f"{SELECTED_WITH_ENCODER} less length": (SELECTED_WITH_ENCODER, "length"),
        f"{SELECTED_WITH_ENCODER} less {both}, the best": (SELECTED_WITH_ENCODER, both),
    }
    differences = {
        name: more(gains[a], gains[b], tests, outcomes).as_dict() for name, (a, b) in pairs.items()
    }
    inside = {}
    if len(set(outcomes.groups or ())) > 1 and apgr_defined(outcomes):
        for kind, each in gains.items():
            held = [outcomes.select(test) for test in tests]
            parts = zip(each, held, strict=True)
            inside[kind] = float(np.mean([within_group_apgr(g[:, -1], o) for g, o in parts]))
    return {"values": values, "within groups": inside, "differences": differences}


def mean_value(gains: list[Floats], tests: list[Rows], outcomes: Outcomes) -> float:
    """Of APGR, or of lift in points where the models are equally good or cost the same."""
    values = []
    for gain, test in zip(gains, tests, strict=True):
        held = outcomes.select(test)
        gain = gain if len(gain) == len(test) else gain[test]
        if apgr_defined(outcomes):
            values.append(apgr(gain[:, -1], held))
        else:
            counts = np.ones((1, len(test)))
            values.append(100 * float((aiq_of(gain, held)(counts) - alone_of(held)(counts))[0]))
    return float(np.mean(values))


def more(a: list[Floats], b: list[Floats], tests: list[Rows], outcomes: Outcomes) -> Band:
    """The metric of a less that of b, averaged over the halves; each resample serves all halves."""
    statistics = []
    for test, *both in zip(tests, a, b, strict=True):
        held = outcomes.select(test)
        pair = [_statistic(gain, held, apgr_defined(outcomes)) for gain in both]
        statistics.append((test, *pair))

    def difference(counts: Floats) -> Floats:
        values = [
            ours(counts[:, test]) - theirs(counts[:, test]) for test, ours, theirs in statistics
        ]
        return np.asarray(np.mean(values, axis=0))

    return bootstrap_counts(difference, len(outcomes), resamples=300)


def _statistic(gain: Floats, held: Outcomes, by_apgr: bool) -> Any:
    last = gain if gain.ndim == 1 else gain[:, -1]
    if by_apgr:
        ranking = Ranking.of(last, held)
        return lambda counts: METRICS["apgr"](ranking, counts)
    area = aiq_of(gain, held)
    return lambda counts: 100 * area(counts)


def summary(predictions: list[Floats], tests: list[Rows], outcomes: Outcomes) -> dict[str, Any]:
    """Of gains (n,): the means over the halves, and each of them."""
    held = [outcomes.select(test) for test in tests]
    by_half = [apgr(gain, part) for gain, part in zip(predictions, held, strict=True)]
    result = {"apgr": float(np.mean(by_half)), "by half": by_half}
    if len(set(outcomes.groups or ())) > 1:
        inside = [
            within_group_apgr(gain, part) for gain, part in zip(predictions, held, strict=True)
        ]
        result["within groups"] = float(np.mean(inside))
    return result


def draw(name: str, figures: Mapping[str, Any]) -> Table:
    """One line for each scorer, a column for each number of labels; then the differences."""
    sizes = list(figures["sizes"])
    by_size = [figures["sizes"][size]["values"] for size in sizes]
    kinds = sorted(by_size[-1], key=lambda kind: -by_size[-1][kind])
    digits = 3 if figures["metric"] == "APGR" else 2
    rows = [[kind, *(f"{values[kind]:.{digits}f}" for values in by_size)] for kind in kinds]
    before = figures["before"]
    rows.append(["selected before", *(f"{before[s]:.3f}" if s in before else "-" for s in sizes)])
    rows.append(["oracle", *[f"{figures['oracle']:.{digits}f}"] * len(sizes)])
    names = list(figures["sizes"][sizes[0]]["differences"])
    for i, start in enumerate(name.split(",")[0].rsplit(" ", 1)[0] for name in names):
        bands = [list(figures["sizes"][size]["differences"].values())[i] for size in sizes]
        shown = [f"{b['value']:+.3f} [{b['low']:+.3f}, {b['high']:+.3f}]" for b in bands]
        label = names[i] if "length" in names[i] else f"{start} the best of those"
        rows.append([label, *shown])
    head = ["scorer", *(f"{size:,}" for size in sizes)]
    return Table(f"{name}: {figures['metric']}", head, rows, right=frozenset(head[1:]))


if __name__ == "__main__":
    typer.run(main)
