"""A task that a router never saw: what exploring costs, and what learning from it is worth.

    python -m benchmarks.learning --data FOLDER

One task is left out at a time: a domain of MMLU, or GSM8K after all of MMLU. A router is fitted on
other labels, then the prompts of the task arrive as a stream. Of those that count as novel, a share
is asked of both models and graded, and after every 100 prompts the router learns. A call of the
weak model costs 0, one of the strong model 1, exploring included. Beside it, on the same stream:

- always strong, and a random choice of as many strong calls (the line between the two models);
- never learning: novel prompts go to the strong model;
- refitted: from nothing, on the old labels and all of the task's that are not in the stream.

Three detectors: the router's own, and ones that call every prompt of the task novel, or every other
one, until the router has learned it, which shows what learning is worth if the task is noticed.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console

from benchmarks.harness import keep
from pliant.errors import InvalidInput
from pliant.reports.tables import Table
from pliant.routing import learn, router_file
from pliant.routing.backends import Answers, Settings, Used
from pliant.routing.fitting.fit import fit
from pliant.routing.live.ledger import Ledger
from pliant.routing.outcomes import Outcomes
from pliant.routing.prompts import Prompt, text_of
from pliant.routing.router import DriftWarning, Router
from pliant.routing.scorers import Scorer
from pliant.routing.scorers.corrections import BACKGROUND, WithCorrections, write_background
from pliant.routing.scorers.novelty import WithNovelty
from pliant.stats import bootstrap

Floats = NDArray[np.float64]

DOMAINS = {
    "law": ("professional_law", "international_law", "jurisprudence"),
    "medicine": ("professional_medicine", "clinical_knowledge", "college_medicine", "anatomy"),
    "mathematics": (
        *("abstract_algebra", "college_mathematics", "elementary_mathematics"),
        *("high_school_mathematics", "high_school_statistics"),
    ),
    "moral scenarios": ("moral_scenarios",),
    "history": ("high_school_world_history", "high_school_us_history", "prehistory"),
    "psychology": ("professional_psychology", "high_school_psychology"),
}
SHARES = (0.1, 0.2)
NOTICED = {0.0: "own detector", 0.5: "half noticed", 1.0: "noticed"}
"""The share of the task's prompts that count as novel, besides those that the router notices."""
EVERY = 100
LABELS = 3_000
"""Old labels that the router is fitted on."""
STREAM = 800
KNOWN = 1_000
"""Old prompts on which to see whether anything is forgotten."""


def main(
    data: Annotated[Path, typer.Option(help="The folder of the two label sets.")],
    only: Annotated[str | None, typer.Option(help="One left-out task.")] = None,
    kind: Annotated[str, typer.Option(help="The scorer.")] = "text",
) -> None:
    """Print the table and write the result."""
    warnings.simplefilter("ignore", DriftWarning)  # a new task is one
    console = Console(highlight=False)
    figures: dict[str, Any] = {}
    for name, known, task in tasks(data):
        if only in (None, name):
            figures[name] = measure(known, task, kind)
            draw(name, figures[name]).draw(console)
    draw_all(figures).draw(console)
    if only is None:
        keep("learning", figures, "python -m benchmarks.learning --data FOLDER")


def tasks(data: Path) -> Iterator[tuple[str, Outcomes, Outcomes]]:
    """Each left-out task: its name, the other labels, and its own."""

    def read(name: str) -> Outcomes:
        path = data / f"{name}-mixtral8x7b-gpt4.jsonl.gz"
        return Outcomes.read(path, models=("weak", "strong"))

    mmlu = read("mmlu")
    yield "GSM8K after MMLU", mmlu, read("gsm8k")
    for name, groups in DOMAINS.items():
        at = np.isin(np.array(mmlu.groups), groups)
        yield name, mmlu.select(~at), mmlu.select(at)


def measure(known: Outcomes, task: Outcomes, kind: str) -> dict[str, Any]:
    """Every policy on one stream."""
    rng = np.random.default_rng(0)
    at, of_task = rng.permutation(len(known)), rng.permutation(len(task))
    old, held = known.select(at[:LABELS]), known.select(at[LABELS:][:KNOWN])
    length = min(STREAM, len(task) // 2)
    stream, rest = task.select(of_task[:length]), task.select(of_task[length:])
    result: dict[str, Any] = {
        "prompts": length,
        "right": dict(zip(("weak", "strong"), stream.right.mean(axis=0).tolist(), strict=True)),
    }
    with tempfile.TemporaryDirectory() as place:
        folder = fitted(old, Path(place) / "router", kind)
        again = fitted(joined(old, rest), Path(place) / "again", kind)
        policies: dict[str, Run] = {
            "always strong": lambda: (np.ones(length), 0.0, None, None),
            "refitted": lambda: run(again, stream, held, 0.0, 0.0),
        }
        for noticed, detector in NOTICED.items():
            for share in (0.0, *SHARES):
                name = f"explore {share:.0%}" if share else "never learning"

                def policy(share: float = share, noticed: float = noticed) -> Policy:
                    copy = Path(place) / f"{share}-{noticed}"
                    shutil.copytree(folder, copy)
                    return run(copy, stream, held, share, noticed)

                policies[f"{name}, {detector}"] = policy
        for name, policy in policies.items():
            result[name] = summary(*policy(), stream, held)
    return result


Policy = tuple[Floats, float, Floats | None, Floats | None]
"""Which prompts the strong model answered; the cost of exploring; and of old prompts, which go to
the strong model before and after the stream."""
Run = Callable[[], Policy]


def fitted(labels: Outcomes, folder: Path, kind: str) -> Path:
    """A router that may send 40 % of the calls it knows to the strong model, as `fit` writes it."""
    backends = {labels.models[0]: "weak=nano-s", labels.models[-1]: "strong=nano-l"}
    goal = "40 % of calls"
    fit(labels, folder, goal=goal, scorers=[kind], backends=backends, force=True)
    place = folder / router_file.read(folder).scorer.folder
    if not (place / BACKGROUND).exists():
        write_background(place, labels.prompts)
    return folder


def joined(a: Outcomes, b: Outcomes) -> Outcomes:
    return Outcomes(
        (*a.prompts, *b.prompts),
        a.models,
        np.concatenate([a.right, b.right]),
        np.concatenate([a.cost, b.cost]),
        unit=a.unit,
    )


def run(folder: Path, stream: Outcomes, held: Outcomes, share: float, noticed: float) -> Policy:
    """The stream through a real router with its ledger; the models' answers are the labels."""
    content = json.loads((folder / router_file.NAME).read_text())
    content |= {"explore": {"share": share}}
    content["ledger"] |= {"prompts": True}
    (folder / router_file.NAME).write_text(json.dumps(content))
    fix_salt(folder / "ledger.sqlite")
    names, calls = router_file.read(folder).names, round(noticed * len(stream))
    mixed = np.random.default_rng(1).permutation(len(stream))
    of_task = frozenset(stream.prompts[i] for i in mixed[:calls])
    right = {p: r for p, r in zip(stream.prompts, stream.right, strict=True)}
    backends = {name: Recorded(name, j, right) for j, name in enumerate(names)}
    strong, exploring = [], 0.0

    def scorer() -> Scorer:
        loaded = router_file.open_router(folder)[1]
        return noticing(loaded, of_task) if of_task else loaded

    before = decisions(folder, scorer(), held, backends)
    for start in range(0, len(stream), EVERY):
        with Router.load(folder, scorer=scorer(), backends=backends) as router:
            for prompt in stream.prompts[start : start + EVERY]:
                reply = router.ask(prompt, verify=lambda answer: float(answer == "right"))
                strong.append(reply.model == names[-1])
            exploring = router.report()["exploration"]["cost"]
        if share:
            with suppress(InvalidInput):  # too few are graded yet
                learn(folder)
    return np.array(strong, float), exploring, before, decisions(folder, scorer(), held, backends)


def fix_salt(path: Path) -> None:
    """Explore the same prompts in every run."""
    Ledger(path).close()
    with closing(sqlite3.connect(path)) as base, base:
        base.execute("UPDATE about SET value = ? WHERE name = 'salt'", (bytes(16),))


def decisions(folder: Path, scorer: Scorer, held: Outcomes, backends: Any) -> Floats:
    """(n,) which old prompts go to the strong model; the ledger does not see them."""
    file, predictions = router_file.read(folder), scorer.predict(held.prompts)
    return np.asarray(file.rule.choose(predictions.gain, predictions.novel), float)


def noticing(scorer: Scorer, of_task: frozenset[str]) -> Scorer:
    """The router's scorer with a detector that calls these prompts of the task novel, too."""
    corrections = None
    if isinstance(scorer, WithCorrections):
        scorer, corrections = scorer.scorer, scorer.corrections
    assert isinstance(scorer, WithNovelty)
    detecting: Scorer = WithNovelty(scorer.scorer, Noticing(scorer.detector, of_task))  # type: ignore[arg-type]
    return detecting if corrections is None else WithCorrections(detecting, corrections)


class Noticing:
    def __init__(self, detector: Any, of_task: frozenset[str]) -> None:
        self._detector, self._of_task = detector, of_task

    def novel(self, prompts: Sequence[Prompt], *vectors: Any) -> NDArray[np.bool_]:
        of_task = np.array([text_of(prompt) in self._of_task for prompt in prompts])
        return np.asarray(self._detector.novel(prompts, *vectors)) | of_task


class Recorded:
    """A model whose answers were graded before."""

    def __init__(self, name: str, column: int, right: dict[str, Floats]) -> None:
        self.name, self._column, self._right = name, column, right

    def ask(self, prompts: Sequence[Prompt], settings: Settings) -> Iterator[tuple[int, Answers]]:
        for i, prompt in enumerate(prompts):
            right = self._right[text_of(prompt)][self._column] > 0.5
            yield i, Answers(("right" if right else "wrong",), Used(1, 1, 1, 1.0))

    def count(self, prompt: Prompt) -> int:
        return 1

    def context(self) -> int | None:
        return None

    def knows(self, unit: str) -> bool:
        return True

    def close(self) -> None: ...


# --- figures -------------------------------------------------------------------------------------


def summary(
    strong: Floats,
    exploring: float,
    before: Floats | None,
    after: Floats | None,
    stream: Outcomes,
    held: Outcomes,
) -> dict[str, Any]:
    """Quality and cost over the stream, and what the choice is worth beyond a random one."""
    right = np.where(strong == 1, stream.strong, stream.weak)
    half = slice(len(stream) // 2, None)
    figures: dict[str, Any] = {
        "of strong": right.mean() / stream.strong.mean(),
        "cost": (strong.sum() + exploring) / len(stream),
        "exploring": exploring / len(stream),
        "second half": {
            "of strong": right[half].mean() / stream.strong[half].mean(),
            "cost": strong[half].mean(),
            "over random": over_random(strong[half], stream.select(np.arange(len(stream))[half])),
        },
        "over random": over_random(strong, stream),
    }
    if before is not None and after is not None:
        old = [np.where(each == 1, held.strong, held.weak).mean() for each in (before, after)]
        figures["known"] = {
            "changed": float((before != after).mean()),
            "right before": old[0],
            "right after": old[1],
            "strong before": before.mean(),
            "strong after": after.mean(),
        }
    return json.loads(json.dumps(figures, default=float))  # type: ignore[no-any-return]


def over_random(strong: Floats, outcomes: Outcomes) -> dict[str, float]:
    """The mean of right answers beyond that of a random choice of as many strong calls."""

    def statistic(at: NDArray[np.int64]) -> float:
        chosen, gain = strong[at], outcomes.gain[at]
        return float((chosen * gain).mean() - chosen.mean() * gain.mean())

    return bootstrap(statistic, len(outcomes)).as_dict()


def draw(name: str, figures: dict[str, Any]) -> Table:
    rows = []
    for policy, each in figures.items():
        if not isinstance(each, dict) or "cost" not in each:
            continue
        late, known = each["second half"], each.get("known")
        rows.append(
            [
                policy,
                f"{each['of strong']:.3f}",
                f"{each['cost']:.3f}",
                f"{late['of strong']:.3f}",
                f"{late['cost']:.3f}",
                f"{late['over random']['value']:+.3f}",
                "-" if known is None else f"{known['changed']:.3f}",
            ]
        )
    head = ["policy", "of strong", "cost", "2nd half", "cost ", "over random", "known changed"]
    right = figures["right"]
    title = (
        f"{name}: {figures['prompts']} prompts, right {right['weak']:.2f} and {right['strong']:.2f}"
    )
    return Table(title, head, rows, right=frozenset(head[1:]))


def draw_all(figures: dict[str, Any]) -> Table:
    """The mean over the left-out tasks."""
    policies = [p for p, each in next(iter(figures.values())).items() if "cost" in str(each)]
    rows = []
    for policy in policies:
        each = [task[policy] for task in figures.values()]
        late = [one["second half"] for one in each]
        rows.append(
            [
                policy,
                f"{np.mean([one['of strong'] for one in each]):.3f}",
                f"{np.mean([one['cost'] for one in each]):.3f}",
                f"{np.mean([one['of strong'] for one in late]):.3f}",
                f"{np.mean([one['cost'] for one in late]):.3f}",
                f"{np.mean([one['over random']['value'] for one in late]):+.3f}",
                f"{sum(one['of strong'] >= 0.9 for one in each)} of {len(each)}",
            ]
        )
    head = ["mean of tasks", "of strong", "cost", "2nd half", "cost ", "over random", ">= .9"]
    return Table(f"{len(figures)} left-out tasks", head, rows, right=frozenset(head[1:]))


if __name__ == "__main__":
    typer.run(main)
