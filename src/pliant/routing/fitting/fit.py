"""From labels to a router: scorers are tried, one is kept, calibrated and given its threshold.

    fitted = fit(Outcomes.read("labels.jsonl"), "my-router", base="nano-s")
    print(fitted.threshold)

Nothing is half-written: the router's folder appears, or is replaced, when all of it is done.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from pliant.errors import InvalidInput
from pliant.routing import router_file
from pliant.routing.backends import Used
from pliant.routing.fitting import training_hashes
from pliant.routing.fitting.evaluate import measure
from pliant.routing.fitting.evaluation import Evaluation
from pliant.routing.fitting.ladder import EVERY, LADDER, READS_A_MODEL, Progress, Rung, climb, keep
from pliant.routing.fitting.splits import Parts, parts
from pliant.routing.goals.goal import Goal
from pliant.routing.goals.thresholds import Threshold, threshold
from pliant.routing.labels.label import JUDGE
from pliant.routing.labels.table import BackendDescription
from pliant.routing.live import drift
from pliant.routing.live.ledger_file import carried
from pliant.routing.metrics import calibration
from pliant.routing.outcomes import Outcomes
from pliant.routing.router_file import RouterFile
from pliant.routing.scorers import Predictions, Scorer, kind_class, make
from pliant.routing.scorers.linear import joined
from pliant.routing.scorers.novelty import NoveltyDetector, WithNovelty

GOAL = "95 % of the large model's quality"
RECORD = "fit.json"
BASELINES = "baselines"


@dataclass(frozen=True, eq=False)
class Fitted:
    """A router that was written, and how it came about."""

    folder: Path
    rungs: tuple[Rung, ...]
    kept: Rung
    parts: Parts
    threshold: Threshold | None
    """None where the price of cost was given."""
    file: RouterFile
    evaluation: Evaluation
    """On the test split, which nothing was chosen on."""

    def as_dict(self) -> dict[str, Any]:
        return {
            "router": str(self.folder),
            "splits": self.parts.sizes(),
            "choice": self.parts.how,
            "ladder": [rung.as_dict() for rung in self.rungs],
            "kept": self.kept.kind,
            "threshold": self.file.threshold.model_dump(mode="json"),
            "evaluation": self.evaluation.as_dict(),
        }


def fit(
    outcomes: Outcomes,
    out: str | Path,
    *,
    scorers: Sequence[str] | None = None,
    base: str | None = None,
    goal: str | Goal = GOAL,
    lam: float | None = None,
    calibrate_by: str = "platt",
    backends: Mapping[str, str] | None = None,
    descriptions: Mapping[str, BackendDescription] | None = None,
    label_cost: Mapping[str, Used] | None = None,
    groups_known: bool = False,
    every: bool = False,
    seed: int = 0,
    progress: Progress = lambda items, _: items,
) -> Fitted:
    """Fit a router and write it to the folder `out`.

    `scorers` are tried (the usual ones, if none are named, and with `every` all that there are;
    those that read a model only with a `base`).
    `lam` takes the place of the goal: each answer is worth its gain less lam times its cost.
    `descriptions` holds the models' backends and prices by their names in the labels
    (`labels.label.backend_descriptions`), and `backends` replaces the backend of a model;
    `label_cost` what making the labels has cost (`labels.label.label_cost`), else theirs is summed.
    """
    goal = Goal.parse(goal) if isinstance(goal, str) else goal
    if lam is not None and not 0 <= lam < math.inf:
        raise InvalidInput(f"lam = {lam}: what a unit of cost is worth, 0 or more and finite")
    folder = Path(out).expanduser()
    _refuse_place(folder)
    tried = kinds(scorers, base, outcomes, every)
    dealt = parts(outcomes, seed)
    rungs = climb(dealt, tried, base, seed, progress)
    kept = keep(rungs, groups_known, outcomes=dealt.ladder)
    train = joined((dealt.train, dealt.choice)).prompts
    scorer = WithNovelty(kept.scorer, NoveltyDetector.fit(train, dealt.ladder.prompts))
    predicted = scorer.predict(dealt.calibration.asked, dealt.calibration.groups)
    costs = outcomes.cost.mean(axis=0)
    chosen = None if lam is not None else of_goal(goal, predicted, dealt.calibration, costs)
    file = router_file.made(
        unit=outcomes.unit,
        models=_models(outcomes, backends or {}, descriptions or {}),
        scorer={"kind": kept.kind, "cost": _scoring_cost(kept, dealt.calibration)},
        default=outcomes.models[-1],
        label_cost=_label_cost(outcomes, label_cost or {}),
        threshold=entry(chosen, lam),
        **reference(predicted, dealt.calibration, calibrate_by),
    )
    rest = {r.kind: r.scorer.predict(dealt.test.asked, dealt.test.groups) for r in rungs}
    found = measure(file, scorer.predict(dealt.test.asked, dealt.test.groups), dealt.test, rest)
    fitted = Fitted(folder, tuple(rungs), kept, dealt, chosen, file, found)
    _write(fitted, scorer)
    return fitted


def of_goal(
    goal: Goal,
    predicted: Predictions,
    outcomes: Outcomes,
    costs: ArrayLike | None = None,
    novel_to: int | None = -1,
) -> Threshold:
    """The threshold that meets a goal on these outcomes, as the router decides on them.

    `costs` are those of the router's file, and `novel_to` is where it sends novel prompts; None
    decides on them by their gains.
    """
    gain = predicted.last_gain if len(outcomes.models) == 2 else predicted.gain
    if predicted.novel is None or novel_to is None:
        return threshold(goal, gain, outcomes, prices=costs)
    return threshold(goal, gain, outcomes, None, costs, predicted.novel, novel_to)


def entry(chosen: Threshold | None, lam: float | None) -> dict[str, Any]:
    """A threshold as a router's file has it; or a price of cost that was given."""
    if chosen is not None:
        return {"on": chosen.on, "value": chosen.value, "sentence": str(chosen)}
    sentence = f"one unit of cost is worth {lam:g} right answers: given, and not chosen"
    return {"on": "worth", "value": lam, "sentence": sentence}


def reference(predicted: Predictions, outcomes: Outcomes, kind: str) -> dict[str, Any]:
    """What the calibration split says of probabilities and of scores to come."""
    if predicted.right is None:
        return {}
    fits = {
        name: calibration.fit(kind, predicted.right[:, j], outcomes.right[:, j])
        for j, name in enumerate(outcomes.models)
    }
    first = fits[outcomes.models[0]]
    scores = 1 - first.apply(predicted.right[:, 0])
    return {
        "calibration": {name: found.to_json() for name, found in fits.items()},
        "drift": drift.reference(scores.tolist()).model_dump(),
    }


# --- what is fitted, and where it goes -----------------------------------------------------------


def kinds(
    scorers: Sequence[str] | None, base: str | None, outcomes: Outcomes, every: bool = False
) -> tuple[str, ...]:
    """Those that are tried: the ones that are named, or else those that can be."""
    if scorers:
        blind = [kind for kind in scorers if kind in READS_A_MODEL and base is None]
        if blind:
            raise InvalidInput(f"{blind[0]} reads a model: name it, as in --base nano-s")
        return tuple(dict.fromkeys(scorers))
    found = [kind for kind in (EVERY if every else LADDER) if base or kind not in READS_A_MODEL]
    return tuple(k for k in found if outcomes.groups or not kind_class(k).needs_groups)


def _models(
    outcomes: Outcomes,
    backends: Mapping[str, str],
    descriptions: Mapping[str, BackendDescription],
) -> list[dict[str, Any]]:
    for name in backends:
        if name not in outcomes.models:
            raise InvalidInput(f"no model {name!r} in the labels: {', '.join(outcomes.models)}")
    # A model with another backend than in the labels also has another price and key.
    own = {name: BackendDescription(backend) for name, backend in backends.items()}
    known = {**descriptions, **own}
    costs = outcomes.cost.mean(axis=0)
    return [
        {"name": name, "cost": float(cost), **known.get(name, BackendDescription(name)).as_dict()}
        for name, cost in zip(outcomes.models, costs, strict=True)
    ]


def _scoring_cost(kept: Rung, outcomes: Outcomes) -> float:
    """Of one prompt, in the labels' unit; in money or tokens, reading a model of one's own is 0."""
    if outcomes.unit == "ms":
        return kept.ms
    return kept.scorer.flops(outcomes.asked) if outcomes.unit == "flops" else 0.0


def _label_cost(outcomes: Outcomes, used: Mapping[str, Used]) -> dict[str, dict[str, float]]:
    """What is known to have been used; else a prompt has cost one answer of each model."""
    graded = {JUDGE: used[JUDGE].as_dict()} if JUDGE in used else {}
    if all(name in used for name in outcomes.models):
        return {name: used[name].as_dict() for name in outcomes.models} | graded
    total = outcomes.cost.sum(axis=0)
    calls = float(len(outcomes))
    return {
        name: {"calls": calls, outcomes.unit: calls if outcomes.unit == "calls" else float(cost)}
        for name, cost in zip(outcomes.models, total, strict=True)
    } | graded


def _refuse_place(folder: Path) -> None:
    """Before the work: where nothing can be written, or something else than a router lies."""
    there = next(place for place in folder.absolute().parents if place.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise InvalidInput(f"{folder}: nothing can be written in {there}")
    if folder.is_file():
        raise InvalidInput(f"{folder} is a file; a router is a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / router_file.NAME).is_file():
        raise InvalidInput(f"{folder} is not empty and holds no router: name another folder")


def _write(fitted: Fitted, scorer: Scorer) -> None:
    """Beside its place first, then in its place: Ctrl-C leaves the old router or the new one."""
    folder, dealt = fitted.folder.absolute(), fitted.parts
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.writing")
    try:
        scorer.save(aside / fitted.file.scorer.folder)
        for kind in ("length", "group"):
            if kind == "length" or dealt.train.groups is not None:
                baseline = make(kind).fit(dealt.train, dealt.choice)
                baseline.save(aside / BASELINES / kind)
        learned = (dealt.train, dealt.choice, dealt.ladder)
        prompts = (prompt for part in learned for prompt in part.prompts)
        training_hashes.write(aside, prompts, dealt.calibration.prompts)
        record = json.dumps(fitted.as_dict(), allow_nan=False, default=_plain)
        (aside / RECORD).write_text(record + "\n", encoding="utf-8")
        fitted.file.write(aside)
        replace(folder, aside)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def replace(folder: Path, aside: Path) -> None:
    """Put a finished folder in place of an old one, whose ledger goes along."""
    if not folder.is_dir():
        aside.rename(folder)
        return
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    with carried(folder, aside):
        folder.rename(old)
        try:
            aside.rename(folder)
        except OSError:
            old.rename(folder)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} has no place in JSON")
