"""Do the goals of `route fit` hold, and what do they cost? 200 fits on labels drawn from each set.

    python -m benchmarks.promises --data FOLDER [--labels FILE]...

A promise is about label sets: of those that could be drawn from one population, at least the stated
share lead to a threshold that keeps the goal on the population. So the rows of a label set are the
population; n labels are drawn from it with replacement, a scorer predicts them out of fold, the
threshold is chosen on these predictions, the scorer is fitted on all n, and the threshold is judged
on the whole population (where a drawn prompt has its out-of-fold prediction, and equal prompts are
in one fold). The scorer is a ridge on the gain with a fixed penalty: TF-IDF words and the group.

In the same run: the fewest calls to the strongest model that suffice where all labels are known;
a threshold that just meets the goal on the same predictions (no test); and what Pliant did before:
a scorer of 55 % of the labels, a threshold from another 15 %, proved by a bet.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from scipy.linalg import cho_factor, cho_solve
from sklearn.feature_extraction.text import TfidfVectorizer

from benchmarks.harness import keep
from pliant.reports.tables import Table
from pliant.routing.decision_rule import Sweep, sweep
from pliant.routing.fitting.fit import GOAL
from pliant.routing.goals.goal import Goal
from pliant.routing.goals.thresholds import GRID, Threshold, threshold
from pliant.routing.outcomes import Outcomes

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]

PLAIN = "95 % of the large model's quality"
PROVED = (GOAL, PLAIN + ", with 95 % confidence", "at most 2 % worse, with 95 % confidence")
SIZES = {"mmlu": (300, 660, 1500), "gsm8k": (300, 660)}
OTHER_SIZES = (300, 660)
LARGEST = 6000  # prompts of a population: the kernel of all pairs is in memory
PENALTY, FOLDS = 8.0, 5
CHECKED = 20  # statements about more labels that are checked, of each set and size
MOST_LABELS = 3000


def main(
    data: Annotated[Path, typer.Option(help="The folder of the MMLU and GSM8K label sets.")],
    labels: Annotated[list[Path], typer.Option(help="Other label sets; repeatable.")] = [],  # noqa: B006
    draws: Annotated[int, typer.Option(help="Label sets drawn of each population.", min=2)] = 200,
    only: Annotated[str, typer.Option(help="One population, by its name.")] = "",
) -> None:
    """Print the tables and write the result."""
    console, figures = Console(highlight=False, width=150), {}
    for population in populations(data, labels, only):
        for n in SIZES.get(population.name, OTHER_SIZES):
            figures[f"{population.name}, {n} labels"] = measured(population, n, draws)
            draw(figures, f"{population.name}, {n} labels").draw(console)
    command = "python -m benchmarks.promises --data FOLDER --labels FILE ..."
    keep(
        f"promises_{only}" if only else "promises",
        figures,
        f"{command} --only {only}" if only else command,
    )


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
    for name in SIZES:
        if only in ("", name):
            path = data / f"{name}-mixtral8x7b-gpt4.jsonl.gz"
            yield population(name, Outcomes.read(path, models=("weak", "strong")))
    for path in labels:
        if only in ("", path.name.split(".")[0]):
            yield population(path.name.split(".")[0], Outcomes.read(path).by_quality())


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
    fold = rng.permutation(np.arange(len(unique)) % FOLDS)[at]
    everything = np.arange(len(population.outcomes))
    final = population.fit(rows)(everything)
    gain = np.empty((n, *final.shape[1:]))
    for k in range(FOLDS):
        gain[fold == k] = population.fit(rows[fold != k])(rows[fold == k])
    final[rows] = gain  # else they would be predicted by a scorer that knows their labels
    return Drawn(rows, population.outcomes.select(rows), gain, final)


# --- ways of choosing a threshold ----------------------------------------------------------------


def measured(population: Population, n: int, draws: int) -> dict[str, Any]:
    """What each way leads to for each goal, over all draws."""
    results: dict[str, list[tuple[float, float]]] = {}
    oracle: dict[str, list[float]] = {}
    more: list[tuple[int, int, float]] = []
    prices = population.outcomes.cost.mean(axis=0)
    for seed in range(draws):
        sample = drawn(population, n, seed)
        known = sweep(sample.final, population.outcomes, prices)
        for text in (PLAIN, *PROVED):
            goal = Goal.parse(text)
            ours = threshold(goal, sample.gain, sample.outcomes, prices=prices)
            note(results, text, "ours", known, ours.value)
            value = just_enough(goal, sweep(sample.gain, sample.outcomes, prices))
            note(results, text, "no test", known, value)
            enough = known.steps.qualities >= population.floor(goal) - 1e-12
            oracle.setdefault(text, []).append(float(known.steps.shares[enough].min()))
            if text == GOAL and ours.more_labels and len(more) < CHECKED:
                more.append((seed, *ours.more_labels))
        for text, value, judged in before(population, sample, prices, seed):
            note(results, text, "before", judged, value)
    return {
        "prompts": len(population.outcomes),
        "labels": n,
        "draws": draws,
        "models": list(population.outcomes.models),
        "strong": population.strong,
        "goals": {
            text: {"oracle calls": float(np.mean(oracle[text]))}
            | {
                way: summary(pairs, population, Goal.parse(text))
                for (text_of, way), pairs in _keyed(results)
                if text_of == text
            }
            for text in (PLAIN, *PROVED)
        },
        "more labels": statements(population, more),
    }


def note(
    results: dict[str, list[tuple[float, float]]], text: str, way: str, known: Sweep, value: float
) -> None:
    """The quality and the share of calls of a threshold on the population."""
    chosen = known.choose(value)
    right, _ = known.outcomes.routed(chosen)
    share = float((chosen == len(known.outcomes.models) - 1).mean())
    results.setdefault(f"{text}|{way}", []).append((float(right.mean()), share))


def _keyed(
    results: dict[str, list[tuple[float, float]]],
) -> Iterator[tuple[tuple[str, str], list[tuple[float, float]]]]:
    for key, pairs in results.items():
        text, way = key.split("|")
        yield (text, way), pairs


def summary(
    pairs: list[tuple[float, float]], population: Population, goal: Goal
) -> dict[str, float]:
    quality, share = np.array(pairs).T
    return {
        "broken": float((quality < population.floor(goal) - 1e-9).mean()),
        "quality over target": float((quality - population.floor(goal)).mean() / population.strong),
        "worst": float((quality - population.floor(goal)).min() / population.strong),
        "calls": float(share.mean()),
        "everything to the strongest": float((share > 0.999).mean()),
    }


def just_enough(goal: Goal, swept: Sweep) -> float:
    """The control without a test: the fewest calls whose quality on these labels is enough."""
    strong = float(swept.outcomes.strong.mean())
    share = goal.share_of_quality(strong)
    assert share is not None
    (meets,) = np.nonzero(swept.steps.qualities >= share * strong - 1e-12)
    return float(swept.steps.values[meets[0]])


def before(
    population: Population, sample: Drawn, prices: Floats, seed: int
) -> Iterator[tuple[str, float, Sweep]]:
    """The thresholds of a scorer of 55 % of the labels, chosen on 15 % of them."""
    unique = np.random.default_rng(seed).permutation(np.unique(sample.rows))
    learned, held = np.split(unique, [int(0.55 * len(unique)), int(0.7 * len(unique))])[:2]
    train = sample.rows[np.isin(sample.rows, learned)]
    calibration = sample.rows[np.isin(sample.rows, held)]
    final = population.fit(train)(np.arange(len(population.outcomes)))
    known = np.isin(sample.rows, learned)
    final[train] = sample.gain[known]  # out of fold, else it is judged on what it learned from
    judged = sweep(final, population.outcomes, prices)
    swept = sweep(final[calibration], population.outcomes.select(calibration), prices)
    for text in (PLAIN, *PROVED):
        goal = Goal.parse(text)
        value = just_enough(goal, swept) if goal.confidence is None else by_bet(goal, swept)
        yield text, value, judged


def by_bet(goal: Goal, swept: Sweep) -> float:
    """The last threshold of the grid before the first whose bet does not pay."""
    assert goal.confidence is not None
    outcomes, passed, last = swept.outcomes, -math.inf, None
    for value in GRID * swept.unit_gain:
        chosen = swept.choose(float(value))
        if last is None or (chosen != last).any():
            routed, _ = outcomes.routed(chosen)
            risk = goal.kind == "risk"
            losses = (1 if risk else goal.amount) * outcomes.strong - routed
            limit = goal.amount if risk else 0.0
            if highest_stake(losses, limit, 1 - goal.confidence) < -math.log(1 - goal.confidence):
                break
            last = chosen
        passed = float(value)
    return passed


def highest_stake(losses: Floats, limit: float, delta: float) -> float:
    """The logarithm of the highest value of a stake that is played through the losses in random
    order (Waudby-Smith and Ramdas): the test that Pliant had before."""
    losses = losses[np.random.default_rng(0).permutation(len(losses))]
    n = len(losses)
    rounds = np.arange(1, n + 1)
    mean = np.cumsum(losses) / (rounds + 1)
    spread = (0.25 + np.cumsum((losses - mean) ** 2)) / (rounds + 1)
    earlier = np.concatenate([[0.25], spread[:-1]])
    bet = np.minimum(np.sqrt(2 * math.log(1 / delta) / (n * earlier)), 0.75 / (1 - limit))
    return float(np.cumsum(np.log1p(bet * (limit - losses))).max())


def statements(population: Population, more: list[tuple[int, int, float]]) -> dict[str, Any]:
    """How often as many labels as a threshold's sentence names lead to the share that it names."""
    met, prices = [], population.outcomes.cost.mean(axis=0)
    for seed, labels, share in more:
        if labels <= MOST_LABELS:
            sample = drawn(population, labels, 100_000 + seed)
            chosen: Threshold = threshold(GOAL, sample.gain, sample.outcomes, prices=prices)
            met.append(chosen.share <= share)
    named = [labels for _, labels, _ in more]
    return {
        "made": len(more),
        "labels": float(np.median(named)) if named else None,
        "checked": len(met),
        "true": float(np.mean(met)) if met else None,
    }


# --- tables --------------------------------------------------------------------------------------


def draw(figures: dict[str, Any], name: str) -> Table:
    result = figures[name]
    rows = []
    for text, ways in result["goals"].items():
        confidence = Goal.parse(text).confidence
        allowed = "-" if confidence is None else f"{1 - confidence:.0%}"
        for way in ("ours", "no test", "before"):
            of = ways[way]
            rows.append(
                [
                    text if way == "ours" else "",
                    way,
                    f"{of['broken']:.1%}",
                    allowed,
                    f"{of['quality over target']:+.3f}",
                    f"{of['worst']:+.3f}",
                    f"{of['calls']:.1%}",
                    f"{of['everything to the strongest']:.0%}",
                    f"{ways['oracle calls']:.1%}",
                ]
            )
    head = ["goal", "way", "broken", "allowed", "over target", "worst", "calls", "all", "oracle"]
    more = result["more labels"]
    estimates = (
        f"; more labels: {more['made']} statements, {more['true']} of {more['checked']} true"
    )
    title = f"{name}, {result['draws']} draws{estimates}"
    return Table(title, head, rows, right=frozenset(head[2:]))


if __name__ == "__main__":
    typer.run(main)
