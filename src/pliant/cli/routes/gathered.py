"""What a report tells of a router: from its folder, from labels, and from its ledger."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pliant.errors import CorruptFile, InvalidInput, PliantError
from pliant.routing.fitting.evaluate import calibrated, evaluation, held_out
from pliant.routing.fitting.fit import RECORD
from pliant.routing.goals.goal import Goal
from pliant.routing.live.costing import Bills
from pliant.routing.live.ledger import Ledger, Totals
from pliant.routing.metrics.curves import lambda_curve, quality_cost_curve
from pliant.routing.outcomes import Outcomes
from pliant.routing.router_file import RouterFile

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Group:
    """The held-out prompts of one group."""

    name: str
    n: int
    weak: float
    strong: float
    routed: float
    share: float
    """Of calls to the strongest model."""


@dataclass(frozen=True, eq=False)
class Measured:
    """An evaluation as JSON has it, and what only the labels themselves can add."""

    content: Mapping[str, Any]
    where: str
    """On which prompts, in words."""
    outdated: bool = False
    """Whether the router's threshold was set anew since: then only the order of prompts holds."""
    perfect: Mapping[str, Any] | None = None
    """The curve of the true gains."""
    worth: Mapping[str, Any] | None = None
    """Of more than two models: the router's curve, as the price of cost goes up."""
    groups: tuple[Group, ...] = ()
    scores: Mapping[str, float] | None = None
    """By prompt."""

    def as_dict(self) -> dict[str, Any]:
        return {
            "where": self.where,
            "outdated": self.outdated,
            **self.content,
            "perfect": self.perfect,
            "worth": self.worth,
            "groups": [vars(group) for group in self.groups],
        }


@dataclass(frozen=True, eq=False)
class Gathered:
    """Everything that the report shows."""

    folder: Path
    file: RouterFile
    measured: Measured | None
    ladder: tuple[Mapping[str, Any], ...]
    """The scorers that were tried when the router was fitted, the best first."""
    totals: Totals | None
    """Of the ledger; None without one, or while it is empty."""

    @property
    def weak(self) -> str:
        return self.file.names[0]

    @property
    def strong(self) -> str:
        return self.file.names[-1]

    @property
    def goal(self) -> str | None:
        """What was asked for, in words; None for a threshold that was set by hand."""
        said = self.file.threshold.sentence.split(":")[0]
        try:
            Goal.parse(said)
        except PliantError:
            return None
        return said

    @property
    def label_cost(self) -> float | None:
        """In the router's unit; None where nothing is known of it."""
        return Bills(self.file).labels() if self.file.label_cost else None

    @property
    def paid_back(self) -> float | None:
        """Prompts after which the router has saved what its labels cost; None if never."""
        if self.measured is None or self.measured.outdated or self.label_cost is None:
            return None
        whole = self.measured.content["curve"]["cost"][-1]
        routed = self.measured.content["routed"]["cost"]["value"]  # scoring is in it
        return self.label_cost / (whole - routed) if whole > routed else None

    def as_dict(self) -> dict[str, Any]:
        return {
            "router": str(self.folder),
            "models": list(self.file.names),
            "unit": self.file.unit,
            "threshold": self.file.threshold.model_dump(mode="json"),
            "measured": None if self.measured is None else self.measured.as_dict(),
            "ladder": list(self.ladder),
            "ledger": None if self.totals is None else self.totals.as_dict(),
            "label_cost": self.label_cost,
            "paid_back": self.paid_back,
        }


def kept(folder: Path, file: RouterFile) -> tuple[Measured | None, tuple[Mapping[str, Any], ...]]:
    """What the fit kept beside the router: its evaluation and its ladder; nothing, if it did not
    come from a fit."""
    path = folder / RECORD
    try:
        record = json.loads(path.read_bytes())
        content, splits = dict(record["evaluation"]), record["splits"]
        if "far" in content:  # what older versions called it
            content["novel"] = content.pop("far")
        outdated = record["threshold"] != file.threshold.model_dump(mode="json")
        where = f"the {int(splits['test']):,} labels that the fit kept apart for this"
        _refuse_other_shapes(content)
        return Measured(content, where, outdated), tuple(record["ladder"])
    except FileNotFoundError:
        return None, ()
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptFile(f"{path}: not what Pliant writes ({error!r})") from error


def measure(folder: Path, labels: Outcomes, name: str) -> Measured:
    """The router on held-out labels."""
    unseen = held_out(folder, labels)
    file, held, predicted = unseen.file, unseen.outcomes, unseen.predicted
    found = evaluation(unseen)
    right = calibrated(file, predicted)
    scores = None if right is None else dict(zip(held.prompts, 1 - right[:, 0], strict=True))
    return Measured(
        found.as_dict(),
        f"{len(held):,} prompts of {name}",
        perfect=_curve(held.right - held.right[:, :1], file, held),
        worth=None if len(file.models) == 2 else _curve(predicted.gain, file, held),
        groups=_groups(held, file.rule.choose(predicted.gain, predicted.novel)),
        scores=scores,
    )


def totals(folder: Path, file: RouterFile, asked: str | None) -> Totals | None:
    """What the ledger adds up to: the named one, or the router's own, if it is there yet."""
    if asked == "none" or (asked is None and file.ledger.path is None):
        return None
    path = Path(asked).expanduser() if asked is not None else folder / str(file.ledger.path)
    if not path.is_file():  # opening it would make one
        if asked is not None:
            raise InvalidInput(f"{path}: there is no ledger (--ledger none: do without)")
        return None
    with Ledger(path) as ledger:
        found = ledger.report()
    return found if found.decisions else None


def _refuse_other_shapes(content: Mapping[str, Any]) -> None:
    """What the report reads of a kept evaluation; anything missing is a KeyError or TypeError."""
    for name in ("scorer", "weak_quality", "strong_quality", "oracle_apgr", "over", "calibration"):
        _ = content[name]
    for name in ("histogram", "novel", "left_out", "paraphrases"):
        _ = content[name]
    for said in (content, *content["baselines"].values()):
        _ = (
            said["curve"]["cost"][-1],
            said["curve"]["quality"][-1],
            said["metrics"]["apgr"]["value"],
        )
    _ = content["routed"]["of_strong_cost"]["value"], content["examples"]["just cheap"]


def _curve(gain: Floats, file: RouterFile, outcomes: Outcomes) -> dict[str, Any]:
    """Of two models by the share of calls, of more by the price of cost, the cheapest first."""
    if len(file.models) == 2:
        return quality_cost_curve(gain[:, -1], outcomes, resamples=1).as_dict()
    curve = lambda_curve(gain, outcomes, [model.cost for model in file.models])
    order = np.argsort(curve.cost, kind="stable")
    return {"cost": curve.cost[order].tolist(), "quality": curve.quality[order].tolist()}


def _groups(outcomes: Outcomes, chosen: Any) -> tuple[Group, ...]:
    if outcomes.groups is None:
        return ()
    rows = np.arange(len(outcomes))
    routed, strong = outcomes.right[rows, chosen], chosen == len(outcomes.models) - 1
    names = np.array(outcomes.groups)

    def group(name: str) -> Group:
        of = names == name
        weak, best = outcomes.weak[of].mean(), outcomes.strong[of].mean()
        figures = (weak, best, routed[of].mean(), strong[of].mean())
        return Group(str(name), int(of.sum()), *map(float, figures))

    return tuple(group(name) for name in sorted(set(outcomes.groups)))
