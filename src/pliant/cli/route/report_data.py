"""What a report draws: a router's file, its evaluation, the fit's ladder, and its ledger."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pliant.errors import CorruptFile, InvalidInput
from pliant.routing.fitting.evaluation import Evaluation
from pliant.routing.fitting.router_folder import RECORD
from pliant.routing.fitting.verdict import Verdict
from pliant.routing.goals.goal import Goal
from pliant.routing.live.decision import Costing
from pliant.routing.live.ledger import Ledger, Totals
from pliant.routing.router_file import RouterFile
from pliant.routing.units import same_price


@dataclass(frozen=True, eq=False)
class Measured:
    """An evaluation, and where it comes from."""

    evaluation: Evaluation
    where: str
    """On which prompts, in words."""
    outdated: bool = False
    """Whether the router's threshold has changed since: then only the order of prompts holds."""

    def as_dict(self) -> dict[str, Any]:
        return {"where": self.where, "outdated": self.outdated, **self.evaluation.as_dict()}


@dataclass(frozen=True, eq=False)
class ReportData:
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
    def share_means_nothing(self) -> bool:
        """Whether the share of calls to the strongest model says nothing about savings: there are
        more than two models, or all cost the same."""
        return len(self.file.names) > 2 or same_price(self.file.costs)

    @property
    def goal(self) -> str | None:
        """The goal in words; None for a threshold that was set by hand."""
        goal = Goal.of_sentence(self.file.threshold.sentence)
        return None if goal is None else str(goal)

    @property
    def label_cost(self) -> float | None:
        """In the router's unit; None where it is unknown."""
        return Costing(self.file).labels() if self.file.label_cost else None

    @property
    def verdict(self) -> Verdict | None:
        """Whether the router pays; None where its threshold was not measured."""
        if self.measured is None or self.measured.outdated:
            return None
        return self.measured.evaluation.verdict

    @property
    def paid_back(self) -> float | None:
        """Prompts after which the router has saved what its labels cost; None if never."""
        return None if self.verdict is None else self.verdict.paid_back(self.label_cost)

    def as_dict(self) -> dict[str, Any]:
        return {
            "router": str(self.folder),
            "models": list(self.file.names),
            "unit": self.file.unit,
            "verdict": None if self.verdict is None else self.verdict.as_dict(),
            "threshold": self.file.threshold.model_dump(mode="json"),
            "measured": None if self.measured is None else self.measured.as_dict(),
            "ladder": list(self.ladder),
            "ledger": None if self.totals is None else self.totals.as_dict(),
            "label_cost": self.label_cost,
            "paid_back": self.paid_back,
        }


def fit_record(
    folder: Path, file: RouterFile
) -> tuple[Measured | None, tuple[Mapping[str, Any], ...]]:
    """The evaluation and the ladder that the fit wrote beside the router, if a fit made it."""
    path = file.fit_folder(folder) / RECORD
    try:
        record = json.loads(path.read_bytes())
        outdated = record["threshold"] != file.threshold.model_dump(mode="json")
        where = f"the {int(record['splits']['test']):,} labels that the fit held out for this"
        measured = Measured(Evaluation.from_dict(record["evaluation"]), where, outdated)
        return measured, tuple(record["ladder"])
    except FileNotFoundError:
        return None, ()
    except (ValueError, KeyError, TypeError, RecursionError, InvalidInput) as error:
        raise CorruptFile(f"{path}: not what Pliant writes ({error!r})") from error


def read_evaluation(path: Path, file: RouterFile) -> Measured:
    """What `pliant route evaluate --json` printed of this router."""
    try:
        evaluation = Evaluation.from_dict(json.loads(path.read_bytes()))
    except FileNotFoundError:
        raise InvalidInput(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError, InvalidInput) as error:
        raise InvalidInput(
            f"{path}: not what `pliant route evaluate --json` prints ({error})"
        ) from error
    models = evaluation.report.models
    if models != file.names:
        raise InvalidInput(
            f"{path}: of a router between {', '.join(models)}, not {', '.join(file.names)}"
        )
    where = f"the {evaluation.report.n:,} prompts of {path.name}"
    return Measured(evaluation, where, evaluation.threshold != file.threshold.limit)


def ledger_totals(folder: Path, file: RouterFile, ledger: str | None) -> Totals | None:
    """What the ledger adds up to: the named one, or the router's own, if it is there yet."""
    if ledger == "none" or (ledger is None and file.ledger.path is None):
        return None
    path = Path(ledger).expanduser() if ledger is not None else folder / str(file.ledger.path)
    if not path.is_file():  # opening it would make one
        if ledger is not None:
            raise InvalidInput(f"{path}: there is no ledger (--ledger none: do without)")
        return None
    with Ledger(path) as opened:
        totals = opened.report()
    return totals if totals.decisions else None
