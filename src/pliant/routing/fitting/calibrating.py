"""What turns a scorer into a router: its threshold, its probabilities, its scores for drift.

calibrate("my-router", Outcomes.read("new.jsonl"), "at most 2 % worse")
calibrate("my-router", ["a prompt", ...], "30 % of calls")   # which needs no labels
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from pliant.errors import InvalidInput
from pliant.files import locked
from pliant.routing import router_file
from pliant.routing.decision_rule import sweep
from pliant.routing.fitting.evaluate import calibrated as probabilities
from pliant.routing.fitting.evaluate import verdict
from pliant.routing.fitting.splits import (
    add_hashes,
    learned_from,
    of_unseen,
    out_of_fold,
)
from pliant.routing.fitting.verdict import SavesNothing, Verdict
from pliant.routing.goals.goal import Goal
from pliant.routing.goals.thresholds import Threshold, threshold, values_by_share
from pliant.routing.live import drift
from pliant.routing.metrics import calibration
from pliant.routing.outcomes import Outcomes
from pliant.routing.prompts import Prompt, messages, text_of
from pliant.routing.router_file import RouterFile
from pliant.routing.scorers import Predictions, Scorer
from pliant.routing.scorers.corrections import WithCorrections
from pliant.routing.scorers.protocol import joined_predictions
from pliant.routing.units import ONE
from pliant.stats import Floats

_LEAST = 50  # prompts to calibrate on


@dataclass(frozen=True)
class Calibrated:
    """The new threshold."""

    threshold: Threshold
    left_out: int
    """Prompts that the router's scorer was fitted on."""
    verdict: Verdict | None = None
    """Whether the router pays at it, on the labels that it was chosen on; None for prompts alone,
    which do not tell."""

    def as_dict(self) -> dict[str, Any]:
        pays = None if self.verdict is None else self.verdict.as_dict()
        return {
            "threshold": self.threshold.to_json(),
            "left_out": self.left_out,
            "verdict": pays,
        }


def calibrate(
    router: str | Path,
    labels: Outcomes | Sequence[Prompt],
    goal: str | Goal,
    kind: str | None = None,
    groups: Sequence[str] | None = None,
    force: bool = False,
) -> Calibrated:
    """Replace a router's calibration, threshold and reference scores; the scorer stays.

    A share of calls needs prompts alone, without labels; then the calibration stays as well, and
    `kind`, the calibration ("platt" by default), cannot be chosen. `groups` are those of the
    prompts, for a scorer that needs them; labels have their own.
    Prompts that the scorer was fitted on count by its out-of-fold predictions of them, so that the
    labels of the fit serve again. From then on the router counts as fitted on labelled ones.
    Raises SavesNothing, with what was measured, where the router would not pay on the labels with
    this quality or risk, and leaves it as it is; `force` writes it all the same. A budget is set,
    with a verdict that says what it is worth.
    """
    folder = Path(router).expanduser()
    goal = Goal.parse(goal) if isinstance(goal, str) else goal
    if kind is not None:
        calibration.kind_class(kind)
    file, scorer = router_file.open_router(folder)
    goal.check_unit(file.unit)
    labelled = isinstance(labels, Outcomes)
    if isinstance(labels, Outcomes):
        outcomes = labels.of_models(file.names).shared()
        file.check_unit(outcomes.unit)
    else:
        outcomes = _unlabelled(labels, file, goal, kind, groups)
    _check_groups(scorer, outcomes)
    held, predictions, unseen = _predicted(scorer, file.fit_folder(folder), outcomes)
    scored = with_scoring(held, file.scoring)
    known = out_of_fold(file.fit_folder(folder), held.prompts)[1]
    chosen = choose_threshold(
        goal, predictions, scored, file.costs, file.novel_to, cross_fitted=len(known) > 0
    )
    if labelled:
        new = reference(predictions, held, kind or "platt", unseen)
    else:
        chosen, new = chosen.unlabelled(), _scores_alone(file, unseen)
    if file.drift is not None and "drift" in new:  # how drift is watched is the user's choice
        new["drift"] |= {name: getattr(file.drift, name) for name in ("window", "false_alarms")}
    content = file.model_dump() | {"threshold": threshold_entry(chosen, None), **new}
    changed = with_shares(router_file.make(**content), predictions, held)
    pays = verdict(changed, predictions, held, scorer.kinds) if labelled else None
    calibrated = Calibrated(chosen, len(outcomes) - len(held), pays)
    promised = goal.kind in ("quality", "risk")  # a budget is set whatever it is worth
    if pays is not None and promised and not (force or pays.pays):
        raise _saves_nothing(folder, calibrated, pays)
    with locked(folder):
        if router_file.read(folder) != file:
            raise InvalidInput(f"{folder}: was fitted or calibrated again meanwhile: repeat this")
        # Before the file: if this stops in between, too many prompts are left out, not too few.
        if labelled:
            add_hashes(file.fit_folder(folder), held.prompts)
        changed.write(folder)
    return calibrated


def _saves_nothing(folder: Path, calibrated: Calibrated, pays: Verdict) -> SavesNothing:
    return SavesNothing(
        f"{folder}: stays as it is, because with this goal the router {pays.headline}. Another "
        "goal or a new fit may save more; --force (force=True) writes this threshold all the same",
        calibrated=calibrated,
    )


def _predicted(
    scorer: Scorer, fit_folder: Path, outcomes: Outcomes
) -> tuple[Outcomes, Predictions, Predictions | None]:
    """The rows that may be calibrated on, and the predictions of them: of all, and of those alone
    that the scorer has not learned from (if they are few, those of the fit's test split).

    Prompts that the scorer has learned from count by what it predicted before it had, with the
    corrections of others that were learned later. A prompt that was itself learned is left out: its
    correction holds its own grade.
    """
    learned = learned_from(fit_folder, outcomes.prompts)
    before, known = out_of_fold(fit_folder, outcomes.prompts)
    if isinstance(scorer, WithCorrections) and len(known):
        fit = outcomes.select(known)
        (others,) = np.nonzero(~scorer.corrections.contains(fit.prompts))
        known, before = known[others], before.select(others)
        if len(others):
            before = scorer.change(fit.select(others).asked, before)
    new = np.flatnonzero(~learned)
    if len(new) + len(known) < _LEAST:
        raise InvalidInput(
            f"{len(new) + len(known)} of these {len(learned):,} prompts can be calibrated on: "
            f"{_LEAST} or more are needed"
        )
    held = outcomes.select(np.concatenate([known, new]))
    if not len(new):
        return held, before, of_unseen(fit_folder)
    fresh = outcomes.select(new)
    unseen = scorer.predict(fresh.asked, fresh.groups)
    predictions = joined_predictions([before, unseen]) if len(known) else unseen
    return held, predictions, unseen if len(new) >= _LEAST else of_unseen(fit_folder)


def _check_groups(scorer: Scorer, outcomes: Outcomes) -> None:
    if scorer.needs_groups and outcomes.groups is None:
        raise InvalidInput(
            f"the router's scorer, {scorer.kind}, needs the group of each prompt, and there is no "
            "column of groups (--group-column)"
        )


def _unlabelled(
    prompts: Sequence[Prompt],
    file: RouterFile,
    goal: Goal,
    kind: str | None,
    groups: Sequence[str] | None,
) -> Outcomes:
    """Prompts as a table in which every answer is wrong, and costs what is usual."""
    if kind is not None:
        raise InvalidInput(f"calibration {kind!r}: needs labels; prompts alone change none")
    if goal.kind != "share":
        raise InvalidInput(
            f"{goal}: needs labels, because it depends on right answers and their costs; only a "
            'share such as "30 % of calls" does not'
        )
    if not prompts:
        raise InvalidInput("there are no prompts to calibrate on")
    n, m = len(prompts), len(file.names)
    conversations = tuple(None if isinstance(p, str) else messages(p) for p in prompts)
    return Outcomes(
        tuple(map(text_of, prompts)),
        file.names,
        np.zeros((n, m)),
        np.tile(file.costs, (n, 1)),
        tuple(groups) if groups is not None else None,
        unit=file.unit,
        messages=conversations if any(conversations) else None,
    )


def _scores_alone(file: RouterFile, unseen: Predictions | None) -> dict[str, Any]:
    """The reference for drift, by the calibration that the router has."""
    right = None if unseen is None else probabilities(file, unseen)
    if right is None:
        return {}
    return {"drift": drift.reference((1 - right[:, 0]).tolist()).model_dump()}


def choose_threshold(
    goal: str | Goal,
    predictions: Predictions,
    outcomes: Outcomes,
    costs: ArrayLike | None = None,
    novel_to: int | None = -1,
    cross_fitted: bool = True,
) -> Threshold:
    """The threshold that meets a goal on these outcomes, as the router decides on them.

    `costs` are those of the router's file, and `novel_to` is where it sends novel prompts; None
    decides on them by their gains. `cross_fitted`: some of the predictions are out of fold.
    """
    gain = predictions.last_gain if len(outcomes.models) == 2 else predictions.gain
    return threshold(goal, gain, outcomes, None, costs, predictions.novel, novel_to, cross_fitted)


def threshold_entry(
    chosen: Threshold | None, lam: float | None, unit: str = "calls"
) -> dict[str, Any]:
    """A threshold for a router's file, or else the price of a unit of cost that replaces it."""
    if chosen is not None:
        return {"on": chosen.on, "value": chosen.value, "sentence": str(chosen)}
    if lam == 0:
        sentence = "Each prompt goes to the model that is likelier right, whatever it costs."
        return {"on": "worth", "value": lam, "sentence": sentence}
    sentence = f"One {ONE[unit]} is worth {lam:g} right answers: set by hand, not chosen."
    return {"on": "worth", "value": lam, "sentence": sentence}


def with_shares(file: RouterFile, predictions: Predictions, outcomes: Outcomes) -> RouterFile:
    """The file with the thresholds for calls that state a share of their own."""
    by_worth = file.rule.prices is not None
    gain = predictions.gain if by_worth else predictions.last_gain
    swept = sweep(gain, outcomes, file.costs, predictions.novel, file.novel_to)
    values = values_by_share(swept, router_file.STEPS)
    return router_file.make(**file.model_dump() | {"shares": values})


def reference(
    predictions: Predictions, outcomes: Outcomes, kind: str, unseen: Predictions | None
) -> dict[str, Any]:
    """The calibrations, and the reference for drift: the scores of `unseen` prompts.

    Out-of-fold predictions come from other fits, whose scores are distributed differently: compared
    with these, new prompts would raise an alarm although nothing has changed.
    """
    if predictions.right is None:
        return {}
    fits = {
        name: calibration.fit(kind, predictions.right[:, j], outcomes.right[:, j])
        for j, name in enumerate(outcomes.models)
    }
    new: dict[str, Any] = {"calibration": {name: fit.to_json() for name, fit in fits.items()}}
    if unseen is not None and unseen.right is not None:
        scores = 1 - fits[outcomes.models[0]].apply(unseen.right[:, 0])
        new["drift"] = drift.reference(scores.tolist()).model_dump()
    return new


def with_scoring(outcomes: Outcomes, scoring: Sequence[float] | Floats | None) -> Outcomes:
    """The outcomes, each answer at its cost with scoring: a budget has to pay for both."""
    if scoring is None:
        return outcomes
    return replace(outcomes, cost=outcomes.cost + np.asarray(scoring, dtype=np.float64))
