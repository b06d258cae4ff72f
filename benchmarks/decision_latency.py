"""How long a decision takes: [CPX] on nano-s beside the text scorers, one by one and in a batch.

    python -m benchmarks.decision_latency

Every scorer decides on each prompt in turn, so that all run under the same load; p50 and p99 are
over prompts. The last column decides on all prompts in one call. The timed function is `predict`,
from the text to the gain, tokenizing included.
"""

from __future__ import annotations

import time
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console

from benchmarks.harness import interleaved, keep
from benchmarks.routing_nano import SMALL, labelled
from pliant.reports.tables import Table
from pliant.routing.scorers import Scorer, make
from pliant.routing.scorers.cpx import Capacity

LORA = "cpx, LoRA rank 4"


def main(
    prompts: Annotated[int, typer.Option(help="How many decisions are timed.")] = 1_000,
    learned: Annotated[int, typer.Option(help="Labels that the scorers learn from.")] = 5_000,
) -> None:
    """Print the table and write the result."""
    torch.set_num_threads(1)
    train = labelled("dev", learned, (0, 1), "dev-latency")
    test = labelled("test", prompts, (0, 1), "test-latency").prompts
    scorers = {kind: scorer.fit(train) for kind, scorer in _scorers().items()}
    figures = {kind: _summary(ms) for kind, ms in _one_at_a_time(scorers, test).items()}
    at_once = interleaved({k: lambda s=s: s.predict(test) for k, s in scorers.items()}, rounds=5)
    for kind, times in at_once.items():
        figures[kind]["prompts a second, at once"] = len(test) / times.median
        figures[kind]["times the TF-IDF's, at once"] = times.ratio_to(at_once["tfidf"]).median
    draw(figures, len(test)).draw(Console(highlight=False))
    keep("decision_latency", figures, "python -m benchmarks.decision_latency")


def _scorers() -> dict[str, Scorer]:
    return {
        "length": make("length"),
        "tfidf": make("tfidf"),
        "text": make("text"),
        "knn": make("knn"),
        "cpx": make("cpx", base=SMALL, capacities=[Capacity(1, 0)], epochs=1),
        LORA: make("cpx", base=SMALL, capacities=[Capacity(1, 4)], epochs=1),
    }


def _one_at_a_time(scorers: dict[str, Scorer], prompts: tuple[str, ...]) -> dict[str, Any]:
    elapsed: dict[str, list[float]] = {kind: [] for kind in scorers}
    for scorer in scorers.values():
        scorer.predict(prompts[:1])
    for prompt in prompts:
        for kind, scorer in scorers.items():
            begun = time.perf_counter()
            scorer.predict([prompt])
            elapsed[kind].append(1000 * (time.perf_counter() - begun))
    return {kind: np.array(ms) for kind, ms in elapsed.items()}


def _summary(ms: Any) -> dict[str, float]:
    p50, p99 = np.percentile(ms, [50, 99])
    return {"p50 ms": float(p50), "p99 ms": float(p99)}


def draw(figures: dict[str, dict[str, float]], prompts: int) -> Table:
    rows = [
        [
            kind,
            f"{figure['p50 ms']:.2f}",
            f"{figure['p99 ms']:.2f}",
            f"{1000 / figure['p50 ms']:,.0f}",
            f"{figure['prompts a second, at once']:,.0f}",
        ]
        for kind, figure in figures.items()
    ]
    head = ["scorer", "p50 ms", "p99 ms", "a second, one by one", "a second, at once"]
    return Table(f"A decision on {SMALL}'s prompts ({prompts:,})", head, rows, frozenset(head[1:]))


if __name__ == "__main__":
    typer.run(main)
