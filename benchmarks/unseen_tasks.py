"""Is a task noticed that the router never saw? `python -m benchmarks.unseen_tasks --data FOLDER`

One task of a label set is left out at a time: a router is fitted on 1,500 labels of the others, and
asked the left-out task and other prompts of the known ones. It should send the left-out task to the
default model, and known prompts no more often than before. The sets: twelve domains of MMLU
(Mixtral-8x7B and GPT-4), MMLU without GSM8K and GSM8K without MMLU, sixteen families of the
embedded models' world, and tasks of BIG-Bench Hard where labels of your own are given (--bbh).

Measured on the left-out task: the quality of the routed answers, of that of the best single model
there; on the known ones: the cost, of the default model's for every prompt. The controls: no check,
the check of Pliant 0.1 (the share of known 5-grams), and the default model for every prompt. Each
way chooses its own threshold for the default goal, out of fold. Where the default model is not the
best one on the left-out task, no check can help: these tasks are counted as well.
"""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console

from benchmarks.harness import keep
from benchmarks.routing_labels import read
from benchmarks.routing_nano import SEEN, labelled
from pliant.reports.tables import Table
from pliant.routing.fitting.fit import GOAL
from pliant.routing.goals.thresholds import threshold
from pliant.routing.outcomes import Outcomes
from pliant.routing.scorers import make
from pliant.routing.scorers.known_grams import BITS, KnownGrams, bits
from pliant.routing.scorers.linear import folds
from pliant.routing.scorers.novelty import NoveltyDetector
from pliant.stats import Floats

Flags = NDArray[np.bool_]
LABELS, KNOWN, UNSEEN, FOLDS = 1500, 1000, 600, 3
ENOUGH = 0.9
"""Of the best model's quality on the left-out task."""
WAYS = ("no check", "known 5-grams", "one scale", "detector", "continuous")
SHIFT, MOST = 0.05, 10.0
"""Of the default model's gain, for each unit of surprise up to so many: the continuous way, without
flags."""
DOMAINS = {
    "mathematics": "abstract_algebra college_mathematics elementary_mathematics "
    "high_school_mathematics high_school_statistics econometrics",
    "physics": "astronomy college_physics conceptual_physics electrical_engineering "
    "high_school_physics",
    "chemistry and biology": "college_biology college_chemistry high_school_biology "
    "high_school_chemistry",
    "computing": "college_computer_science computer_security high_school_computer_science "
    "machine_learning",
    "medicine": "anatomy clinical_knowledge college_medicine human_aging human_sexuality "
    "medical_genetics nutrition professional_medicine virology",
    "law": "international_law jurisprudence professional_law",
    "history": "high_school_european_history high_school_us_history high_school_world_history "
    "prehistory",
    "business": "business_ethics high_school_macroeconomics high_school_microeconomics management "
    "marketing professional_accounting public_relations",
    "philosophy": "formal_logic logical_fallacies moral_disputes moral_scenarios philosophy "
    "world_religions",
    "society": "high_school_psychology professional_psychology sociology",
    "politics": "global_facts high_school_geography high_school_government_and_politics "
    "security_studies us_foreign_policy",
    "miscellaneous": "miscellaneous",
}


@dataclass(frozen=True, eq=False)
class Case:
    """One task left out of one set."""

    name: str
    learn: Outcomes
    known: Outcomes
    unseen: Outcomes


def main(
    data: Annotated[Path, typer.Option(help="The folder of the MMLU and GSM8K labels.")],
    bbh: Annotated[Path | None, typer.Option(help="Labels of BIG-Bench Hard, by task.")] = None,
    code: Annotated[Path | None, typer.Option(help="HumanEval's prompts (JSONL, gz).")] = None,
    kind: Annotated[str, typer.Option(help="The scorer that is fitted.")] = "text",
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 0,
    jobs: Annotated[int, typer.Option(help="Processes.", min=1)] = 2,
) -> None:
    """Print the tables and write the results."""
    console = Console(highlight=False)
    sets = tables(data, bbh)
    cases = {name: [*leave_out(outcomes, seed)] for name, outcomes in sets.items()}
    cases["MMLU and GSM8K"] = [*transfers(data, seed)]
    figures: dict[str, Any] = {"scorer": kind, "goal": GOAL, "sets": {}}
    with ProcessPoolExecutor(jobs) as pool:
        running = {
            name: {case.name: pool.submit(measure, case, kind, seed) for case in each}
            for name, each in cases.items()
        }
        for name, tasks in running.items():
            results = {task: future.result() for task, future in tasks.items()}
            figures["sets"][name] = {"tasks": results, "summary": summary(results)}
            draw(name, results).draw(console)
    every = {
        f"{name}: {t}": r for name, x in figures["sets"].items() for t, r in x["tasks"].items()
    }
    figures["all"] = summary(every)
    draw_summary(figures).draw(console)
    if code is not None:
        figures["code"] = flagged_code(code, sets, seed)
        console.print(f"share of HumanEval's prompts that are novel: {figures['code']}")
    keep("unseen_tasks", figures, "python -m benchmarks.unseen_tasks --data FOLDER")


# --- the sets ------------------------------------------------------------------------------------


def tables(data: Path, bbh: Path | None) -> dict[str, Outcomes]:
    """Label sets whose groups are the tasks."""
    domain = {subject: name for name, words in DOMAINS.items() for subject in words.split()}
    mmlu, nano = read(data, "mmlu"), labelled("dev", 3_000, SEEN, "unseen")
    assert mmlu.groups is not None and nano.groups is not None
    sets = {
        "nano": replace(nano, groups=tuple(group.split("/")[0] for group in nano.groups)),
        "MMLU": replace(mmlu, groups=tuple(domain[subject] for subject in mmlu.groups)),
    }
    return sets if bbh is None else {**sets, "BIG-Bench Hard": Outcomes.read(bbh)}


def leave_out(outcomes: Outcomes, seed: int) -> Iterator[Case]:
    rng, groups = np.random.default_rng(seed), np.array(outcomes.groups)
    for task in sorted(set(groups)):
        known, unseen = (
            rng.permutation(np.flatnonzero(x)) for x in (groups != task, groups == task)
        )
        labels = min(LABELS, len(known) * 3 // 4)
        yield Case(
            task,
            outcomes.select(known[:labels]),
            outcomes.select(known[labels : labels + KNOWN]),
            outcomes.select(unseen[:UNSEEN]),
        )


def transfers(data: Path, seed: int) -> Iterator[Case]:
    """Each of two label sets is the other one's left-out task."""
    rng = np.random.default_rng(seed)
    mmlu, gsm8k = read(data, "mmlu"), read(data, "gsm8k")
    mmlu, gsm8k = (each.select(rng.permutation(len(each))) for each in (mmlu, gsm8k))
    rows = np.arange(len(mmlu))
    first, rest = rows < LABELS, (rows >= LABELS) & (rows < LABELS + KNOWN)
    yield Case("GSM8K", mmlu.select(first), mmlu.select(rest), gsm8k.select(range(UNSEEN)))
    half = np.arange(len(gsm8k)) < len(gsm8k) // 2
    yield Case("MMLU", gsm8k.select(half), gsm8k.select(~half), mmlu.select(range(UNSEEN)))


# --- one task left out ---------------------------------------------------------------------------


def measure(case: Case, kind: str, seed: int) -> dict[str, Any]:
    """Every way of treating novel prompts, with the same scorer."""
    learn = case.learn.by_quality()
    known, unseen = (each.of_models(learn.models) for each in (case.known, case.unseen))
    parts, scorer = [folds(learn, FOLDS, seed)], make(kind)
    held_out = scorer.cross_validate(learn, parts, seed)
    scorer.fit(learn, seed=seed)
    predictions = [held_out, scorer.predict(known.asked), scorer.predict(unseen.asked)]
    tables, texts = (learn, known, unseen), (known.asked, unseen.asked)
    grams = known_grams(learn, parts[0][0])
    detector = NoveltyDetector.fit(learn, parts, seed)
    one_scale = NoveltyDetector.fit(learn, parts, seed, prior=1e9)
    surprise = [detector.known, *(detector.surprise(each) for each in texts)]
    flags: dict[str, list[Flags]] = {
        "no check": [np.zeros(len(each), dtype=np.bool_) for each in tables],
        "known 5-grams": [grams.novel(each.prompts) for each in tables],
        "one scale": [one_scale.out_of_fold, *(one_scale.novel(each) for each in texts)],
        "detector": [each > detector.bound for each in surprise],
    }
    gains = [each.last_gain for each in predictions]
    shifted = [g + SHIFT * np.minimum(s, MOST) for g, s in zip(gains, surprise, strict=True)]
    quality = unseen.right.mean(axis=0)
    return {
        "labels": len(learn),
        "unseen": len(unseen),
        "quality": dict(zip(learn.models, quality.tolist(), strict=True)),
        "default is best": bool(quality[-1] >= quality.max() - 1e-12),
        **{way: routed(gains, novel, tables) for way, novel in flags.items()},
        "continuous": routed(shifted, flags["no check"], tables),
    }


def known_grams(learn: Outcomes, held_out: NDArray[np.int64]) -> KnownGrams:
    """As Pliant 0.1 fitted it: .5 % of the held-out prompts contain fewer known 5-grams."""
    rest = np.setdiff1d(np.arange(len(learn)), held_out)
    counts = Counter(bit for row in rest for bit in bits(learn.prompts[row]))
    table = np.zeros(BITS, dtype=np.bool_)
    table[[bit for bit, _ in counts.most_common(20_000)]] = True
    grams = KnownGrams(table, 0.0)
    grams.bound = float(np.quantile(grams.share(learn.select(held_out).prompts), 0.005))
    return grams


def routed(
    gains: list[Floats], novel: list[Flags], tables: tuple[Outcomes, ...]
) -> dict[str, float]:
    """What the router does at the threshold that its labels choose for the default goal."""
    learn, known, unseen = tables
    chosen = threshold(GOAL, gains[0], learn, novel=novel[0])
    on_known, on_unseen = (chosen.models_for(gains[i], novel[i]) for i in (1, 2))
    (right, cost), left_out = known.routed(on_known), unseen.routed(on_unseen)[0].mean()
    return {
        "novel": float(novel[2].mean()),
        "false alarms": float(novel[1].mean()),
        "to the default": float((on_unseen == len(learn.models) - 1).mean()),
        "of the best": float(left_out / unseen.right.mean(axis=0).max()),
        "known quality": float(right.mean() / known.strong.mean()),
        "known cost": float(cost.mean() / known.cost[:, -1].mean()),
    }


def flagged_code(path: Path, sets: Mapping[str, Outcomes], seed: int) -> dict[str, Any]:
    """The share of code prompts that is novel to routers that were fitted on all tasks of a set."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        prompts = [json.loads(line)["prompt"] for line in lines]
    shares = {}
    for name, outcomes in sets.items():
        rows = np.random.default_rng(seed).permutation(len(outcomes))[:LABELS]
        learn = outcomes.select(rows)
        parts = [folds(learn, FOLDS, seed)]
        shares[name] = {
            "known 5-grams": float(known_grams(learn, parts[0][0]).novel(prompts).mean()),
            "detector": float(NoveltyDetector.fit(learn, parts, seed).novel(prompts).mean()),
        }
    return shares


# --- what it comes to ----------------------------------------------------------------------------


def summary(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """How many left-out tasks keep enough quality, and at what cost on the known ones."""
    tasks = list(results.values())
    helped = [task for task in tasks if task["default is best"]]

    def of(way: str) -> dict[str, float]:
        return {
            "enough": sum(task[way]["of the best"] >= ENOUGH for task in tasks),
            "enough where the default is best": sum(
                task[way]["of the best"] >= ENOUGH for task in helped
            ),
            "worst where the default is best": min(task[way]["of the best"] for task in helped),
            **{
                name: float(np.mean([task[way][name] for task in tasks]))
                for name in ("novel", "false alarms", "known quality", "known cost")
            },
        }

    always = sum(task["default is best"] or _always(task) >= ENOUGH for task in tasks)
    return {
        "tasks": len(tasks),
        "default is best": len(helped),
        "ways": {way: of(way) for way in WAYS},
        "always the default": {"enough": always, "known cost": 1.0},
    }


def _always(task: Mapping[str, Any]) -> float:
    quality = list(task["quality"].values())
    return float(quality[-1] / max(quality))


def draw(name: str, results: Mapping[str, Mapping[str, Any]]) -> Table:
    rows = [
        [
            task if result["default is best"] else f"{task} *",
            *(f"{result[way]['of the best']:.2f}" for way in WAYS),
            *(f"{result[way]['novel']:.2f}" for way in ("known 5-grams", "one scale", "detector")),
            f"{result['detector']['known cost']:.2f}",
        ]
        for task, result in results.items()
    ]
    flagged = ["5-grams", "one scale", "detector"]
    head = ["left out", *WAYS, *(f"novel: {way}" for way in flagged), "known cost"]
    title = f"{name}: quality on the left-out task, of the best model's (* not the default)"
    return Table(title, head, rows, right=frozenset(head[1:]))


def draw_summary(figures: Mapping[str, Any]) -> Table:
    sets = {name: each["summary"] for name, each in figures["sets"].items()} | {
        "all": figures["all"]
    }
    rows = []
    for name, each in sets.items():
        for way, x in each["ways"].items():
            rows.append(
                [
                    name,
                    way,
                    f"{x['enough']} of {each['tasks']}",
                    f"{x['enough where the default is best']} of {each['default is best']}",
                    *(f"{x[key]:.2f}" for key in ("worst where the default is best", "novel")),
                    *(f"{x[key]:.3f}" for key in ("false alarms", "known quality", "known cost")),
                ]
            )
        enough = each["always the default"]["enough"]
        rows.append(
            [name, "always the default", f"{enough} of {each['tasks']}", *"------"[:5], "1.000"]
        )
    head = ["set", "way", "quality >= .9", "where the default is best", "worst", "novel"]
    head += ["false alarms", "known quality", "known cost"]
    return Table("Left-out tasks", head, rows, right=frozenset(head[2:]))


if __name__ == "__main__":
    typer.run(main)
