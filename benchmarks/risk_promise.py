"""How often is a proved risk exceeded? `python -m benchmarks.risk_promise --data LABELS ...`

A promise such as "at most 2 % worse, with 95 % confidence" is about calibration sets: of those that
could be drawn from one population, at least 95 % lead to a threshold that meets it on that
population. So half of each label set trains a scorer (TF-IDF ridge on the gain, with the means of
the groups), and the other half is the population, where the true risk of every threshold is known:
1,000 calibration sets are drawn from it with replacement.

The controls, in the same run: a threshold whose loss on the calibration set is just small enough
(no test at all), the same sequence of tests with Hoeffding's inequality, and with the bet; and the
share of strong calls that suffices if the population is known.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import Ridge

from benchmarks.harness import keep
from pliant.routing import Outcomes
from pliant.routing.goals.goal import Goal
from pliant.routing.goals.risk import highest_stake
from pliant.routing.goals.thresholds import threshold

Floats = NDArray[np.float64]
Test = Callable[[Floats, float, float], bool]
GOALS = ((0.02, 0.05), (0.05, 0.1))
GRID = np.linspace(-1, 1, 401)  # every fifth of the default's: a fifth of the time


@dataclass(frozen=True)
class Population:
    """Prompts whose labels and predictions are known."""

    name: str
    outcomes: Outcomes
    gain: Floats

    def loss(self, value: float) -> float:
        """The quality of the strong model less that of the router."""
        return float((self.outcomes.gain * (self.gain <= value)).mean())

    def fewest_calls(self, epsilon: float) -> float:
        """The share of strong calls that suffices if the population is known."""
        return min(
            float((self.gain > value).mean()) for value in GRID if self.loss(value) <= epsilon
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", nargs="*", default=[], type=Path, help="label sets (JSONL, gz)")
    parser.add_argument("--models", nargs=2, default=("weak", "strong"), help="their columns")
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--sizes", nargs="*", type=int, default=[500, 2000])
    args = parser.parse_args()
    populations = [simulated(), *(real(path, args.models) for path in args.data)]
    results = [
        measured(population, n, epsilon, delta, args.draws)
        for population in populations
        for n in args.sizes
        for epsilon, delta in GOALS
    ]
    show(results, args.draws)
    names = " ".join(path.name for path in args.data)
    keep("risk_promise", results, f"python -m benchmarks.risk_promise --data {names}".rstrip())


def simulated(n: int = 100_000, seed: int = 0) -> Population:
    """Prompts of different difficulty for both models, and a scorer that predicts it with noise."""
    rng = np.random.default_rng(seed)
    hard = rng.beta(0.6, 1.2, n)
    right = rng.random((n, 2)) < np.stack([1 - hard, 1 - 0.55 * hard], axis=1)
    gain = 0.45 * hard + rng.normal(scale=0.08, size=n)
    prompts = tuple(map(str, range(n)))
    outcomes = Outcomes(prompts, ("small", "large"), right.astype(float), np.tile([0.0, 1], (n, 1)))
    return Population("simulated", outcomes, gain)


def real(path: Path, models: tuple[str, str]) -> Population:
    """Half of a label set, predicted by a scorer that was trained on the other half."""
    train, rest = Outcomes.read(path, models=models).split((0.5, 0.5), seed=0)
    vectorizer = TfidfVectorizer(sublinear_tf=True, min_df=2, ngram_range=(1, 2))
    ridge = Ridge(alpha=3.0).fit(vectorizer.fit_transform(train.prompts), train.gain)
    by_words = ridge.predict(vectorizer.transform(rest.prompts))
    if train.groups is None or rest.groups is None or len(set(train.groups)) == 1:
        return Population(path.name, rest, by_words)
    groups = np.array(train.groups)
    means = {g: train.gain[groups == g].mean() for g in set(train.groups)}
    by_group = np.array([means.get(g, train.gain.mean()) for g in rest.groups])
    return Population(path.name, rest, (by_words + by_group) / 2)


def measured(
    population: Population, n: int, epsilon: float, delta: float, draws: int
) -> dict[str, Any]:
    """How often each way of choosing a threshold breaks the promise, and its strong calls."""
    rng = np.random.default_rng(0)
    size, goal = len(population.gain), Goal("risk", epsilon, 1 - delta)
    values: dict[str, list[float]] = {"by_risk": [], "bet": [], "hoeffding": [], "no test": []}
    for _ in range(draws):
        rows = rng.integers(0, size, n)
        gain, sample = population.gain[rows], population.outcomes.select(rows)
        values["by_risk"].append(threshold(goal, gain, sample, GRID).value)
        for name, test in (("bet", _bet), ("hoeffding", _hoeffding)):
            values[name].append(walk(gain, sample.gain, epsilon, delta, test))
        values["no test"].append(just_enough(gain, sample.gain, epsilon))
    return {
        "labels": population.name,
        "population": size,
        "calibration": n,
        "epsilon": epsilon,
        "delta": delta,
        "draws": draws,
        "calls_if_all_were_known": population.fewest_calls(epsilon),
        "ways": {
            name: {
                "broken": sum(population.loss(value) > epsilon for value in chosen),
                "calls": float(np.mean([(population.gain > value).mean() for value in chosen])),
            }
            for name, chosen in values.items()
        },
    }


def walk(gain: Floats, true_gain: Floats, epsilon: float, delta: float, test: Test) -> float:
    """The last threshold of the grid before the first that does not pass."""
    passed, before = -math.inf, -1
    for value in GRID:
        weak = gain <= value
        if int(weak.sum()) != before:
            before = int(weak.sum())
            if not test(true_gain * weak, epsilon, delta):
                break
        passed = float(value)
    return passed


def just_enough(gain: Floats, true_gain: Floats, epsilon: float) -> float:
    """The control without a test: the last threshold whose loss is small enough on these rows."""
    order = np.argsort(gain)
    loss = np.concatenate([[0], np.cumsum(true_gain[order])]) / len(gain)
    at = loss[np.searchsorted(gain[order], GRID, side="right")]
    return float(GRID[np.flatnonzero(at <= epsilon)[-1]])


def _bet(losses: Floats, limit: float, delta: float) -> bool:
    return highest_stake(losses, limit, delta) >= math.log(1 / delta)


def _hoeffding(losses: Floats, limit: float, delta: float) -> bool:
    margin = limit - float(losses.mean())
    return margin > 0 and math.exp(-len(losses) * margin**2 / 2) <= delta


def show(results: list[dict[str, Any]], draws: int) -> None:
    table = Table(title=f"Broken promises of {draws:,}, and strong calls")
    for name in ("labels", "n", "goal", "allowed"):
        table.add_column(name)
    ways = list(results[0]["ways"])
    for name in [*ways, "population known"]:
        table.add_column(name, justify="right")
    for row in results:
        cells = [f"{row['ways'][w]['broken']}, {row['ways'][w]['calls']:.1%}" for w in ways]
        table.add_row(
            row["labels"],
            f"{row['calibration']:,}",
            f"{row['epsilon']:.0%} worse, {1 - row['delta']:.0%}",
            f"{row['delta'] * draws:.0f}",
            *cells,
            f"{row['calls_if_all_were_known']:.1%}",
        )
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
