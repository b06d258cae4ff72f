"""From labels to a router: try scorers, select one, calibrate it and choose its threshold.

    fitted = fit(Outcomes.read("labels.jsonl"), "my-router", base="nano-s")
    print(fitted.threshold)

A fit writes a folder of its own inside the router's, then router.json, which names it: before that
moment the router is the old one, after it the new one. All else in the folder stays as it is.
"""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pliant.errors import InvalidInput
from pliant.routing import router_file
from pliant.routing.backends import ModelSpec, Used, open_backend
from pliant.routing.fitting.calibrating import (
    choose_threshold,
    reference,
    threshold_entry,
    with_scoring,
    with_shares,
)
from pliant.routing.fitting.evaluate import BASELINES, measure
from pliant.routing.fitting.evaluation import Evaluation
from pliant.routing.fitting.ladder import (
    EVERY,
    LADDER,
    Progress,
    Rung,
    apgr_defined,
    climb,
    continued_by,
    fitted_as_saved,
    select,
)
from pliant.routing.fitting.router_folder import RECORD, SCORER, refuse_folder, replace_fit
from pliant.routing.fitting.splits import (
    Splits,
    partitions,
    split,
    write_hashes,
)
from pliant.routing.fitting.verdict import SavesNothing, Verdict
from pliant.routing.goals.goal import Goal
from pliant.routing.goals.thresholds import Threshold
from pliant.routing.labels.label import JUDGE
from pliant.routing.labels.table import BackendDescription
from pliant.routing.metrics import calibration
from pliant.routing.outcomes import Outcomes
from pliant.routing.router_file import RouterFile
from pliant.routing.scorers import (
    READS_A_MODEL,
    READS_AN_ENCODER,
    Predictions,
    Scorer,
    kind_class,
    make,
)
from pliant.routing.scorers.corrections import write_background
from pliant.routing.scorers.novelty import NoveltyDetector, WithNovelty
from pliant.routing.units import percent

GOAL = "95 % of the large model's quality, with 80 % confidence"
_LEAST_GAIN = 0.01
"""Of quality, that the best routing would add to the best model: with less, nothing is learnt."""


@dataclass(frozen=True, eq=False)
class Fitted:
    """A fitted router, and how it was fitted."""

    folder: Path
    rungs: tuple[Rung, ...]
    selected: Rung
    splits: Splits
    threshold: Threshold | None
    """None if `lam` was passed instead of a goal."""
    file: RouterFile
    evaluation: Evaluation
    """On the test split, which nothing was chosen on."""
    predictions: Predictions
    """The selected scorer's of the other labels, out of fold."""
    unseen: Predictions
    """Those of the test split."""

    @property
    def verdict(self) -> Verdict:
        """Whether the router pays."""
        assert self.evaluation.verdict is not None
        return self.evaluation.verdict

    @property
    def ladder(self) -> list[dict[str, Any]]:
        """Every scorer that was tried, the best first, and by which metric."""
        metric = "apgr" if apgr_defined(self.splits.learn) else "aiq"
        return [{**rung.as_dict(), "metric": metric} for rung in self.rungs]

    def __str__(self) -> str:
        return str(self.verdict)

    def as_dict(self) -> dict[str, Any]:
        return {
            "router": str(self.folder),
            "verdict": self.verdict.as_dict(),
            "splits": self.splits.sizes(),
            "choice": self.splits.how,
            "ladder": self.ladder,
            "selected": self.selected.kind,
            "threshold": self.file.threshold.model_dump(mode="json"),
            "evaluation": self.evaluation.as_dict(),
        }


def fit(
    outcomes: Outcomes,
    out: str | Path,
    *,
    scorers: str | Sequence[str] | None = None,
    base: str | None = None,
    encoder: str | None = None,
    goal: str | Goal | None = None,
    lam: float | None = None,
    calibrate_by: str = "platt",
    backends: Mapping[str, str] | None = None,
    descriptions: Mapping[str, BackendDescription] | None = None,
    label_cost: Mapping[str, Used] | None = None,
    groups_known: bool = False,
    every: bool = False,
    seed: int = 0,
    force: bool = False,
    progress: Progress = lambda items, _: items,
) -> Fitted:
    """Fit a router and write it to the folder `out`, if it pays.

    Raises SavesNothing, with all that was measured, where the router neither saves anything on the
    test split nor answers better than the strongest model alone; `force` writes that one, too.
    `scorers` are the kinds to try (the default ones if none are named, and all of them with
    `every`; those that read a model only with a `base`, or an `encoder` only with one).
    The strongest model is the one that the labels show to be right most often, and the default.
    The goal is GOAL or, if no model is cheaper than the strongest, that each prompt goes to the
    model that is likelier right. `lam` replaces it: each answer is worth its gain less lam times
    its cost.
    `descriptions` hold each model's backend and price by its name in the labels
    (`labels.label.backend_descriptions`), and `backends` overrides the backend of a model;
    `label_cost` is what making the labels cost (`labels.label.label_cost`), by default the sum of
    their costs.
    """
    splits = _ordered(split(outcomes, seed))
    outcomes = outcomes.of_models(splits.learn.models)
    aim = _aim(goal, lam, outcomes)
    _refuse_nothing_to_gain(outcomes)
    calibration.kind_class(calibrate_by)
    models = _models(outcomes, backends or {}, descriptions or {})
    folder, local = Path(out).expanduser(), _local(models)
    refuse_folder(folder)
    tried = kinds(scorers, base, outcomes, every, groups_known, encoder)
    rungs = climb(splits, tried, base, seed, progress, local, groups_known, encoder)
    selected = select(rungs, splits.learn, groups_known)
    held = splits.learn
    scorer, predictions = _with_novelty(selected, splits, seed)
    unseen = scorer.predict(splits.test.asked, splits.test.groups)
    scored = with_scoring(held, selected.scoring)
    chosen = None
    if isinstance(aim, Goal):
        chosen = choose_threshold(aim, predictions, scored, outcomes.mean_cost)
    file = router_file.make(
        unit=outcomes.unit,
        models=models,
        scorer=_scorer_entry(selected, local),
        default=outcomes.models[-1],
        label_cost=_label_cost(outcomes, label_cost or {}),
        threshold=threshold_entry(chosen, None if isinstance(aim, Goal) else aim, outcomes.unit),
        **reference(predictions, held, calibrate_by, unseen),
    )
    file = with_shares(file, predictions, held)
    evaluation = _evaluation(file, unseen, rungs, splits, scorer.kinds)
    parts = (selected, splits, chosen, file, evaluation, predictions, unseen)
    fitted = Fitted(folder, tuple(rungs), *parts)
    if not (force or fitted.verdict.pays):
        raise _saves_nothing(fitted)
    write(fitted, scorer)
    return fitted


def _saves_nothing(fitted: Fitted) -> SavesNothing:
    return SavesNothing(
        f"{fitted.folder}: not written, because the router {fitted.verdict.headline}. The labels "
        "stay as they are; --force (force=True) writes the router all the same",
        fitted=fitted,
    )


def _with_novelty(selected: Rung, splits: Splits, seed: int) -> tuple[WithNovelty, Predictions]:
    """The selected scorer with a detector, and its out-of-fold predictions with novelty flags."""
    train, scorer = splits.train, selected.scorer
    folds = partitions(train, seed)  # of all rows: those of `splits` hold out none that only train
    detector = NoveltyDetector.fit(train, folds, seed, scorer.vectors(train.asked))
    flagged = replace(selected.predictions, novel=detector.out_of_fold[: len(splits.learn)])
    return WithNovelty(scorer, detector), flagged


def _evaluation(
    file: RouterFile,
    unseen: Predictions,
    rungs: Sequence[Rung],
    splits: Splits,
    kinds: Sequence[str],
) -> Evaluation:
    """The router on the test split, beside every scorer that was tried and the controls."""
    test, controls = splits.test, _baselines(rungs, splits)
    baselines = {kind: each.predict(test.asked, test.groups) for kind, each in controls.items()}
    return measure(file, unseen, test, baselines, kinds=kinds)


def _ordered(splits: Splits) -> Splits:
    """The models by their quality on the labels to learn from: the test split chooses nothing."""
    names = splits.learn.by_quality().models
    learn, test = splits.learn.of_models(names), splits.test.of_models(names)
    partial = None if splits.incomplete is None else splits.incomplete.of_models(names)
    return Splits(learn, splits.partitions, test, partial)


def _baselines(rungs: Sequence[Rung], splits: Splits) -> dict[str, Scorer]:
    """All scorers that were tried and, where there are groups, the one that knows them: the best
    fixed assignment of groups to models comes from it."""
    scorers = {rung.kind: rung.scorer for rung in rungs}
    for kind in ("length", *(("group",) if splits.learn.groups is not None else ())):
        if kind not in scorers:
            scorers[kind] = fitted_as_saved(make(kind), splits.train)
    return scorers


def _aim(goal: str | Goal | None, lam: float | None, outcomes: Outcomes) -> Goal | float:
    """The goal of the threshold, or the price of a unit of cost that replaces it."""
    if goal is not None and lam is not None:
        raise InvalidInput("goal and lam both set the threshold: give one of them")
    if goal is None and lam is None and outcomes.strong_costs_no_more:
        return 0.0
    if lam is not None:
        if 0 <= lam < math.inf:
            return lam
        raise InvalidInput(f"lam={lam}: the price of a unit of cost must be 0 or more and finite")
    goal = GOAL if goal is None else goal
    goal = Goal.parse(goal) if isinstance(goal, str) else goal
    goal.check_unit(outcomes.unit)
    return goal


def _refuse_nothing_to_gain(outcomes: Outcomes) -> None:
    """Before the work: where the best model is the cheapest, and no other adds right answers."""
    shared = outcomes.shared()
    best, costs, quality = shared.best, shared.mean_cost, shared.mean_right
    possible = float(shared.right.max(axis=1).mean() - quality[best])
    if not quality[best]:
        raise InvalidInput(
            f"no model is right on any of the {len(shared):,} prompts: look at the answers, and "
            "at how they are graded (--verifier)"
        )
    if costs[best] > costs.min() * (1 + 1e-9) or possible >= _LEAST_GAIN:
        return
    name = outcomes.models[best]
    others = ", ".join(
        f"{other} on {percent(q)}"
        for other, q in zip(outcomes.models, quality, strict=True)
        if other != name
    )
    raise InvalidInput(
        f"nothing to gain from routing: {name} is right on {percent(quality[best])} of the prompts "
        f"({others}), no model is cheaper, and perfect routing would be right on only "
        f"{percent(possible)} more of them. Always ask {name}"
    )


# --- what is fitted, and where it is written -----------------------------------------------------


def kinds(
    scorers: str | Sequence[str] | None,
    base: str | None,
    outcomes: Outcomes,
    every: bool = False,
    groups_known: bool = False,
    encoder: str | None = None,
) -> tuple[str, ...]:
    """The kinds to try: the named ones, or else those that need nothing that is missing."""
    scorers = (scorers,) if isinstance(scorers, str) else scorers
    if scorers:
        for kind in scorers:
            needs_groups = kind_class(kind).needs_groups  # refuses an unknown name, too
            if kind in READS_A_MODEL and base is None:
                raise InvalidInput(f"{kind} reads a model: name one, as in --base nano-s")
            if needs_groups and outcomes.groups is None:
                raise InvalidInput(f"{kind} needs labels with a column of groups (--group-column)")
        return tuple(dict.fromkeys(scorers))
    usable = list(EVERY if every or groups_known else LADDER)
    if base is None:
        usable = [kind for kind in usable if kind not in READS_A_MODEL]
    if encoder is None:
        usable = [kind for kind in usable if kind not in READS_AN_ENCODER]
    return tuple(k for k in usable if outcomes.groups or not kind_class(k).needs_groups)


def _models(
    outcomes: Outcomes, backends: Mapping[str, str], descriptions: Mapping[str, BackendDescription]
) -> list[dict[str, Any]]:
    for name, backend in backends.items():
        if name not in outcomes.models:
            raise InvalidInput(f"no model {name!r} in the labels: {', '.join(outcomes.models)}")
        open_backend(ModelSpec.parse(backend)).close()  # refuses an unknown one; it loads nothing
    # A model with another backend than in the labels also has another price and key.
    own = {name: BackendDescription(backend) for name, backend in backends.items()}
    known = {**descriptions, **own}
    costs = outcomes.mean_cost
    return [
        {"name": name, "cost": float(cost), **known.get(name, BackendDescription(name)).as_dict()}
        for name, cost in zip(outcomes.models, costs, strict=True)
    ]


def _scorer_entry(selected: Rung, local: Mapping[str, str]) -> dict[str, Any]:
    """What the router's file says of its scorer."""
    return {
        "kind": selected.kind,
        "folder": f"fit-{secrets.token_hex(4)}/{SCORER}",
        "cost": selected.cost,
        "ms": selected.ms,
        "continued_by": continued_by(selected.scorer, local),
    }


def _local(models: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What each model that runs on this machine is loaded from, if it gets prompts as they are:
    a scorer reads them so, and a framed prompt has another prefill."""
    plain = [entry for entry in models if not entry.get("prompt_format")]
    specs = {str(entry["name"]): ModelSpec.parse(entry["backend"]) for entry in plain}
    return {name: spec.model for name, spec in specs.items() if spec.url is None}


def _label_cost(outcomes: Outcomes, used: Mapping[str, Used]) -> dict[str, dict[str, float]]:
    """The recorded use, or else the cost of one answer of each model for each prompt."""
    graded = {JUDGE: used[JUDGE].as_dict()} if JUDGE in used else {}
    if all(name in used for name in outcomes.models):
        return {name: used[name].as_dict() for name in outcomes.models} | graded
    calls = dict(zip(outcomes.models, outcomes.answers.astype(float).tolist(), strict=True))
    if outcomes.unit == "calls":  # the file's models say what a call costs
        return {name: {"calls": number} for name, number in calls.items()} | graded
    # As `Used` counts tokens; nothing is known of the prompts' apart.
    unit = "answer_tokens" if outcomes.unit == "tokens" else outcomes.unit
    totals = np.nansum(outcomes.cost, axis=0).tolist()
    costs = dict(zip(outcomes.models, totals, strict=True))
    return {name: {"calls": calls[name], unit: costs[name]} for name in costs} | graded


def write(fitted: Fitted, scorer: Scorer) -> None:
    """Write the fit into its router's folder, in place of the one before it."""
    replace_fit(fitted.folder, fitted.file, partial(_write_fit, fitted, scorer))


def _write_fit(fitted: Fitted, scorer: Scorer, folder: Path) -> None:
    """The scorer, its baselines, which prompts were used, and how the fit went."""
    splits = fitted.splits
    scorer.save(folder / SCORER)
    write_background(folder / SCORER, splits.train.prompts)
    controls = _baselines(fitted.rungs, splits)
    for kind in {"length", "group"} & controls.keys():
        controls[kind].save(folder / BASELINES / kind)
    partly = () if splits.incomplete is None else splits.incomplete.prompts
    write_hashes(folder, splits.learn.prompts, fitted.predictions, partly, fitted.unseen)
    record = json.dumps(fitted.as_dict(), allow_nan=False, default=np.generic.item)
    (folder / RECORD).write_text(record + "\n", encoding="utf-8")
