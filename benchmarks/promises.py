"""Do the goals of `route fit` hold, and what do they cost? 200 fits on labels drawn from each set.

    python -m benchmarks.promises --data FOLDER [--labels FILE]... [--only NAME]

A promise is about label sets: of those that could be drawn from one population, at least the stated
share lead to a threshold that keeps the goal on the population. So the rows of a label set are the
population; n labels are drawn from it with replacement, a scorer predicts them out of fold (as many
times as `fit` does), the threshold is chosen on the mean of these predictions, the scorer is fitted
on all n, and the threshold is judged on the whole population (where a drawn prompt has its
out-of-fold prediction, and equal prompts are in one fold). The scorer is a ridge on the gains with
a fixed penalty: TF-IDF words and the group.

`mmlu` and `gsm8k` are the public labels of FOLDER; each FILE is a population of its own, for any
number of models. `specialists` are the three of benchmarks/specialists.py at one price, and `five`
these, nano-s at the same price and nano-l, which costs five times as much.

Beside the goals that the documentation names, each set has one for which about 40 % of the calls
are needed: the percentage of the strongest model's quality for which that is nearest.

In the same run: the fewest calls to the strongest model that suffice where all labels are known; a
threshold that just meets the goal on the same predictions (no test); and the fewest calls of any
procedure with the same confidence, labels and predictions (promises_limit.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from scipy.linalg import cho_factor, cho_solve
from scipy.stats import binomtest
from sklearn.feature_extraction.text import TfidfVectorizer

from benchmarks.harness import keep
from benchmarks.promises_limit import Curve
from benchmarks.specialists import five_labels
from pliant.reports.tables import Table
from pliant.routing.decision_rule import Sweep, sweep
from pliant.routing.fitting.fit import GOAL
from pliant.routing.goals.goal import Goal
from pliant.routing.goals.thresholds import Threshold, threshold
from pliant.routing.outcomes import Outcomes

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]

PLAIN = "95 % of the large model's quality"
SURE = ", with 95 % confidence"
PROVED = (GOAL, PLAIN + SURE, "at most 2 % worse" + SURE)
NEED, PERCENTS = 0.4, range(80, 100)
PUBLIC, EMBEDDED = ("mmlu", "gsm8k"), ("specialists", "five")
SIZES = {"mmlu": (300, 660, 1500), "gsm8k": (300, 660), "nano": (300, 660)}
OTHER_SIZES = (660,)
LARGEST = 6000  # prompts of a population: the kernel of all pairs is in memory
PENALTY, FOLDS = 8.0, 5
REPEATS = ((1_000, 3), (3_000, 2), (10_000, 1))  # as `fit` divides up to so many labels
CHECKED = 20  # statements about more labels that are checked, of each set and size
MOST_LABELS = 3000
DRAWS = 200


def main(
    data: Annotated[Path, typer.Option(help="The folder of the MMLU and GSM8K label sets.")],
    labels: Annotated[list[Path], typer.Option(help="Other label sets; repeatable.")] = [],  # noqa: B006
    draws: Annotated[int, typer.Option(help="Label sets drawn of each population.", min=2)] = DRAWS,
    only: Annotated[str, typer.Option(help="One population, by its name.")] = "",
    sizes: Annotated[list[int], typer.Option(help="Numbers of labels; repeatable.")] = [],  # noqa: B006
) -> None:
    """Print the tables and write the result of each population."""
    console = Console(highlight=False, width=160)
    for population in populations(data, labels, only):
        name, figures = population.name, {}
        for n in sizes or SIZES.get(name, OTHER_SIZES):
            figures[f"{n} labels"] = measured(population, n, draws)
            draw(f"{name}, {n} labels", figures[f"{n} labels"]).draw(console)
            keep(f"promises_{name}", figures, _command(name, draws, sizes))


def _command(name: str, draws: int, sizes: Sequence[int]) -> str:
    options = [f"--only {name}", *(f"--sizes {n}" for n in sizes)]
    options += [] if draws == DRAWS else [f"--draws {draws}"]
    return " ".join(["python -m benchmarks.promises --data FOLDER --labels FILE ...", *options])


# --- populations and scorers ---------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Population:
    """Prompts of which all labels are known, and how alike each two are."""

    name: str
    outcomes: Outcomes
    kernel: NDArray[np.float32]

    @property
    def strong(self) -> float:
        return float(self.outcomes.strong.mean())

    def floor(self, goal: Goal) -> float:
        """The quality that keeps the goal."""
        share = goal.share_of_quality(self.strong)
        assert share is not None
        return share * self.strong

    def fit(self, rows: Rows) -> Callable[[Rows], Floats]:
        """Predictions of the gains, by a ridge on these rows: (n,) of two models, or (n, m)."""
        gains = self.outcomes.right[rows] - self.outcomes.right[rows, :1]
        mean = gains.mean(axis=0)
        between = self.kernel[np.ix_(rows, rows)].astype(np.float64)
        between[np.diag_indices(len(rows))] += PENALTY
        weights = cho_solve(cho_factor(between, check_finite=False), gains - mean)

        def predict(at: Rows) -> Floats:
            gain = np.clip(self.kernel[np.ix_(at, rows)] @ weights + mean, -1, 1)
            return gain if gain.shape[1] > 2 else gain[:, 1]

        return predict


def populations(data: Path, labels: list[Path], only: str) -> Iterator[Population]:
    files = {path.name.split(".")[0].split("-")[0]: path for path in labels}
    for name in (*PUBLIC, *files, *EMBEDDED):
        if only in ("", name):
            yield population(name, _read(name, data, files).by_quality())


def _read(name: str, data: Path, files: dict[str, Path]) -> Outcomes:
    if name in PUBLIC:
        return Outcomes.read(data / f"{name}-mixtral8x7b-gpt4.jsonl.gz", models=("weak", "strong"))
    if name in files:
        return Outcomes.read(files[name])
    labels = five_labels(2000)
    return labels if name == "five" else labels.of_models(labels.models[:3])


def population(name: str, outcomes: Outcomes) -> Population:
    picked = np.random.default_rng(0).permutation(len(outcomes))[:LARGEST]
    outcomes = outcomes.select(np.sort(picked))
    words = TfidfVectorizer(sublinear_tf=True, min_df=2).fit_transform(outcomes.prompts)
    kernel = (words @ words.T).toarray().astype(np.float32)
    if outcomes.groups is not None:
        groups = np.array(outcomes.groups)
        kernel += groups[:, None] == groups[None, :]
    return Population(name, outcomes, kernel)


@dataclass(frozen=True, eq=False)
class Drawn:
    """Labels drawn from a population, predicted out of fold and by the scorer of all of them."""

    rows: Rows
    outcomes: Outcomes
    gain: Floats
    """Of the drawn rows, out of fold."""
    final: Floats
    """Of the population."""


def drawn(population: Population, n: int, seed: int) -> Drawn:
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, len(population.outcomes), n)
    unique, at = np.unique(rows, return_inverse=True)
    everything = np.arange(len(population.outcomes))
    final = population.fit(rows)(everything)
    gain = np.zeros((n, *final.shape[1:]))
    repeats = next(times for most, times in REPEATS if n <= most)
    for _ in range(repeats):
        fold = rng.permutation(np.arange(len(unique)) % FOLDS)[at]
        for k in range(FOLDS):
            predicted = population.fit(rows[fold != k])(rows[fold == k])
            gain[fold == k] += predicted / repeats
    final[rows] = gain  # else they would be predicted by a scorer that knows their labels
    return Drawn(rows, population.outcomes.select(rows), gain, final)


# --- ways of choosing a threshold ----------------------------------------------------------------


def measured(population: Population, n: int, draws: int) -> dict[str, Any]:
    """What each way leads to for each goal, over all draws."""
    goals = [PLAIN, *PROVED, *goals_that_need_most_calls(population, n)]
    results: dict[str, dict[str, list[dict[str, float]]]] = {text: {} for text in goals}
    more: list[tuple[int, int, float]] = []
    prices = population.outcomes.cost.mean(axis=0)
    for seed in range(draws):
        sample = drawn(population, n, seed)
        known = sweep(sample.final, population.outcomes, prices)
        swept, curve = sweep(sample.gain, sample.outcomes, prices), Curve.of(known)
        for text in goals:
            goal, ways = Goal.parse(text), results[text]
            ours = chosen_by_fit(goal, sample, prices)
            ways.setdefault("ours", []).append(result(known, ours.value))
            ways.setdefault("no test", []).append(result(known, just_enough(goal, swept)))
            ways.setdefault("need", []).append(need(known, population.floor(goal)))
            if goal.confidence is not None:
                ways.setdefault("limit", []).append(curve.least(goal, n))
            if text == GOAL and ours.more_labels and len(more) < CHECKED:
                more.append((seed, *ours.more_labels))
    return {
        "prompts": len(population.outcomes),
        "labels": n,
        "draws": draws,
        "models": list(population.outcomes.models),
        "prices": (prices / prices[-1]).tolist(),
        "right": population.outcomes.mean_right.tolist(),
        "goals": {
            text: {way: summary(each, population, text) for way, each in ways.items()}
            for text, ways in results.items()
        },
        "more labels": statements(population, more),
    }


def goals_that_need_most_calls(population: Population, n: int) -> list[str]:
    """The quality for which nearest to NEED of the calls are needed, with both confidences; none
    where no quality needs about that many."""
    needs: dict[int, list[float]] = {percent: [] for percent in PERCENTS}
    for seed in range(10):
        sample = drawn(population, n, seed)
        known = sweep(sample.final, population.outcomes, population.outcomes.cost.mean(axis=0))
        for percent, each in needs.items():
            each.append(need(known, percent / 100 * population.strong)["calls"])
    nearest = min(needs, key=lambda percent: abs(float(np.mean(needs[percent])) - NEED))
    if abs(float(np.mean(needs[nearest])) - NEED) > 0.05 or nearest == 95:
        return []
    text = f"{nearest} % of the large model's quality"
    return [f"{text}, with 80 % confidence", text + SURE]


def chosen_by_fit(goal: Goal, sample: Drawn, prices: Floats) -> Threshold:
    return threshold(goal, sample.gain, sample.outcomes, prices=prices, cross_fitted=True)


def result(known: Sweep, value: float) -> dict[str, float]:
    """What a threshold does on the population."""
    chosen = known.choose(value)
    right, cost = known.outcomes.routed(chosen)
    return {
        "quality": float(right.mean()),
        "calls": float((chosen == len(known.outcomes.models) - 1).mean()),
        "cost": float(cost.mean() / known.outcomes.cost[:, -1].mean()),
    }


def need(known: Sweep, floor: float) -> dict[str, float]:
    """The fewest calls, and the lowest cost, with which the quality suffices."""
    steps = known.steps
    enough = steps.qualities >= floor - 1e-12
    strongest = known.outcomes.cost[:, -1].mean()
    return {
        "calls": float(steps.shares[enough].min()),
        "cost": float(steps.costs[enough].min() / strongest),
    }


def summary(each: list[dict[str, float]], population: Population, text: str) -> dict[str, Any]:
    """Means over the draws and, where there is a quality, how often it breaks the goal."""
    means = {name: float(np.mean([one[name] for one in each])) for name in each[0]}
    if "quality" not in means:
        return means
    floor = population.floor(Goal.parse(text))
    over = np.array([one["quality"] for one in each]) - floor
    broken = int((over < -1e-9).sum())
    interval = binomtest(broken, len(each)).proportion_ci(0.95, "exact")
    return means | {
        "broken": broken / len(each),
        "broken, 95 %": [interval.low, interval.high],
        "quality over target": float(over.mean() / population.strong),
        "its standard error": float(over.std() / len(each) ** 0.5 / population.strong),
        "worst": float(over.min() / population.strong),
        "everything to the strongest": float(np.mean([one["calls"] > 0.999 for one in each])),
    }


def just_enough(goal: Goal, swept: Sweep) -> float:
    """The control without a test: the fewest calls whose quality on these labels is enough."""
    strong = float(swept.outcomes.strong.mean())
    share = goal.share_of_quality(strong)
    assert share is not None
    (meets,) = np.nonzero(swept.steps.qualities >= share * strong - 1e-12)
    return float(swept.steps.values[meets[0]])


def statements(population: Population, more: list[tuple[int, int, float]]) -> dict[str, Any]:
    """How often as many labels as a threshold's sentence names lead to the share that it names."""
    met, prices = [], population.outcomes.cost.mean(axis=0)
    for seed, labels, share in more:
        if labels <= MOST_LABELS:
            sample = drawn(population, labels, 100_000 + seed)
            chosen = chosen_by_fit(Goal.parse(GOAL), sample, prices)
            met.append(chosen.share <= share)
    named = [labels for _, labels, _ in more]
    return {
        "made": len(more),
        "labels": float(np.median(named)) if named else None,
        "checked": len(met),
        "true": float(np.mean(met)) if met else None,
    }


# --- tables --------------------------------------------------------------------------------------


def draw(name: str, figures: dict[str, Any]) -> Table:
    rows = []
    for text, ways in figures["goals"].items():
        confidence = Goal.parse(text).confidence
        allowed = "-" if confidence is None else f"{1 - confidence:.0%}"
        least = ways.get("limit", {"calls": np.nan, "cost": np.nan})
        for way in ("ours", "no test"):
            of = ways[way]
            low, high = of["broken, 95 %"]
            rows.append(
                [
                    text if way == "ours" else "",
                    way,
                    f"{of['broken']:.1%} [{low:.1%}, {high:.1%}]",
                    allowed,
                    f"{of['quality over target']:+.3f}",
                    f"{of['worst']:+.3f}",
                    *(
                        f"{of[what]:.1%} / {least[what]:.1%} / {ways['need'][what]:.1%}"
                        for what in ("calls", "cost")
                    ),
                ]
            )
    of_three = "{}: this / any procedure / known"
    head = ["goal", "way", "broken", "allowed", "over target", "worst"]
    head += [of_three.format(what) for what in ("calls", "cost")]
    more = figures["more labels"]
    estimates = f"more labels: {more['made']} statements, {more['true']} of {more['checked']} true"
    title = f"{name}, {figures['draws']} draws; {estimates}"
    return Table(title, head, rows, right=frozenset(head[2:]))


if __name__ == "__main__":
    typer.run(main)
