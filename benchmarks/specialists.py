"""Specialists at one price: a router beside the best model of each group and the best single model.

    python -m benchmarks.specialists [--bbh LABELS]

`nano`: three models of one architecture, so of one price: nano-s, trained on for a few hundred
steps on letters, on small numbers or on large ones. The group of a question is its family. All
families of numbers are asked with small and with large ones, so that a fixed assignment of families
to models, which knows the family, cannot be perfect; it would be if the specialities were the
families. `bbh`: labels of two real models, counted as equally expensive; the group is the task.

A router is fitted at lambda 0 on part of the labels, without the groups, and measured on the rest,
on several splits. Both controls come from the same training labels. An interval is over prompts,
each with its mean difference over the splits in which it was a test prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console

from benchmarks.harness import CACHE, keep
from benchmarks.nano_answers import Batch, padded
from pliant import nano
from pliant.data import splits as splits_of
from pliant.nano import Question
from pliant.reports.tables import Table
from pliant.routing import router_file
from pliant.routing.fitting.assignment import assigned
from pliant.routing.fitting.fit import fit
from pliant.routing.outcomes import Outcomes
from pliant.routing.scorers.baselines import Group
from pliant.stats import Floats, bootstrap_counts

SPECIALITIES: dict[str, Callable[[Question], bool]] = {
    "letters": lambda q: q.domain == "words",
    "small numbers": lambda q: q.domain != "words" and q.difficulty <= 3,
    "large numbers": lambda q: q.domain != "words" and q.difficulty > 3,
}
FAMILIES = [family.name for family in nano.TRAINED if family.domain != "reading"]
"""Those with short prompts: others take twenty times as long to train on."""
STEPS, ROWS, RATE = 300, 32, 1e-3
LARGE_COSTS = 4.9  # nano-l's price of an answer, of nano-s's 1, as `route label` counts FLOPs
CONTROLS = ("best model of each group", "best single model")


def main(
    questions: Annotated[int, typer.Option(help="Labels of the nano models; 0: none.")] = 2000,
    train: Annotated[int, typer.Option(help="Labels that a router is fitted on.")] = 1000,
    splits: Annotated[int, typer.Option(help="Of each set.", min=1)] = 5,
    scorer: Annotated[list[str], typer.Option(help="Kinds to try.")] = ["text"],  # noqa: B006
    bbh: Annotated[
        Path | None, typer.Option(help="Labels of two models on BIG-Bench Hard.")
    ] = None,
) -> None:
    """Print the table and write the result."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    tables = {"nano": nano_labels(questions)} if questions else {}
    if bbh is not None:
        labels = Outcomes.read(bbh).shared()
        tables["bbh"] = replace(labels, cost=np.ones_like(labels.cost), unit="calls")
    figures: dict[str, Any] = {"scorers": scorer, "train": train, "splits": splits}
    for name, table in tables.items():
        figures[name] = measure(table, min(train, len(table) * 2 // 3), splits, scorer)
    draw({name: figures[name] for name in tables}).draw(Console(highlight=False))
    keep("specialists", figures, "python -m benchmarks.specialists --bbh LABELS")


def measure(table: Outcomes, train: int, splits: int, kinds: list[str]) -> dict[str, Any]:
    """The router and its controls on every split."""
    n, times = len(table), np.zeros(len(table))
    sums = {name: np.zeros(n) for name in ("router", *CONTROLS, "perfect routing")}
    for seed in range(splits):
        parts = splits_of(n, (train / n, 1 - train / n), seed, table.inseparable())
        learn, rows = table.select(parts[0]), np.asarray(parts[1])
        test = table.select(rows)
        times[rows] += 1
        for name, right in on_split(learn, test, kinds, seed).items():
            sums[name][rows] += right

    def mean(values: Floats) -> dict[str, float]:
        return bootstrap_counts(
            lambda counts: (counts @ values) / np.maximum(counts @ times, 1), n
        ).as_dict()

    return {
        "labels": n,
        "trained on": train,
        "alone": dict(zip(table.models, table.right.mean(axis=0).tolist(), strict=True)),
        "right": {name: mean(values) for name, values in sums.items()},
        "router's more": {name: mean(sums["router"] - sums[name]) for name in CONTROLS},
    }


def on_split(learn: Outcomes, test: Outcomes, kinds: list[str], seed: int) -> dict[str, Floats]:
    """(n,) of each: how often it is right on each test prompt."""
    with TemporaryDirectory() as folder:
        fit(learn, folder, scorers=kinds, lam=0.0, seed=seed, force=True)
        file, scorer = router_file.open_router(Path(folder))
    held = test.of_models(file.names)
    predictions = scorer.predict(held.asked)
    chosen = file.rule.choose(predictions.gain, predictions.novel)
    by_group = Group().fit(learn.of_models(file.names)).predict(held.asked, held.groups)
    return {
        "router": held.routed(chosen)[0],
        CONTROLS[0]: assigned(by_group, held, 1.0, file.costs),
        CONTROLS[1]: held.strong,  # a fit's last model is right most often on its labels
        "perfect routing": held.right.max(axis=1),
    }


def draw(figures: dict[str, Any]) -> Table:
    rows = []
    for name, result in figures.items():
        for who, right in result["right"].items():
            more = result["router's more"].get(who)
            shown = "-"
            if more is not None:
                low, high = 100 * more["low"], 100 * more["high"]
                shown = f"{100 * more['value']:+.1f} [{low:+.1f}, {high:+.1f}]"
            rows.append([name, who, f"{100 * right['value']:.1f} %", shown])
    head = ["labels", "who answers", "right", "router's more, points (95 %)"]
    return Table("Specialists at one price", head, rows, right=frozenset(head[2:]))


# --- three specialists of one size ---------------------------------------------------------------


def nano_labels(number: int) -> Outcomes:
    """Who of the three is right on each question; every call costs 1."""
    path = CACHE / f"specialists-{number}.jsonl"
    if not path.is_file():
        CACHE.mkdir(exist_ok=True)
        asked = nano.questions("dev", number, families=FAMILIES)
        right = np.stack([graded(specialist(n), asked) for n in SPECIALITIES], axis=1)
        Outcomes(
            tuple(question.prompt for question in asked),
            tuple(SPECIALITIES),
            right,
            np.ones_like(right),
            groups=tuple(question.family for question in asked),
        ).write(path)
    return Outcomes.read(path)


def five_labels(number: int) -> Outcomes:
    """The three, then nano-s at their price, and nano-l."""
    path = CACHE / f"five-{number}.jsonl"
    if not path.is_file():
        three = nano_labels(number)
        asked = nano.questions("dev", number, families=FAMILIES)
        assert tuple(question.prompt for question in asked) == three.prompts
        general = [graded(nano.load(name), asked) for name in nano.NAMES]
        prices = [1.0] * (len(SPECIALITIES) + 1) + [LARGE_COSTS]
        replace(
            three,
            models=(*three.models, *nano.NAMES),
            right=np.column_stack([three.right, *general]),
            cost=np.tile(prices, (number, 1)),
        ).write(path)
    return Outcomes.read(path, models=(*SPECIALITIES, *nano.NAMES))


def specialist(name: str) -> tuple[Any, Any]:
    """nano-s, trained on with questions of one speciality."""
    model, tokenizer = nano.load("nano-s")
    torch.manual_seed(0)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, STEPS)
    for batch in batches(tokenizer, SPECIALITIES[name]):
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval(), tokenizer


def batches(tokenizer: Any, belongs: Callable[[Question], bool]) -> Iterator[Batch]:
    wanted = (question for question in nano.stream("train", 0, FAMILIES) if belongs(question))
    for _ in range(STEPS):
        yield padded(tokenizer, list(islice(wanted, ROWS)))


def graded(specialist: tuple[Any, Any], asked: list[Question]) -> Floats:
    answers = nano.ask(*specialist, [question.prompt for question in asked])
    pairs = zip(asked, answers, strict=True)
    return np.array([float(question.check(answer)) for question, answer in pairs])


if __name__ == "__main__":
    typer.run(main)
