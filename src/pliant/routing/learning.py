"""Learn from a router's graded answers, without fitting it again.

    learn("my-router")                        # corrects its scorer near the explored prompts
    labels("my-router").write("more.jsonl")   # the same prompts as labels, to fit again with

Only explored prompts count: those that every model was asked, with a grade for each answer. A gain
is a difference. Where only the answer of the chosen model is graded, half of that difference is
missing: a prompt that the weak model fails looks like a gain of the strong one, even if both fail.
Routers of that kind are worse (APGR .56 to .58 instead of .62 to .68 on GSM8K and MMLU; grades that
users give by themselves are selected as well), so such grades are reported and not learned from.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pliant.errors import InvalidInput
from pliant.files import locked
from pliant.routing import router_file
from pliant.routing.fitting.splits import HASHES, add_hashes
from pliant.routing.live.grades import Labelled
from pliant.routing.live.ledger import Ledger
from pliant.routing.outcomes import Outcomes
from pliant.routing.router_file import RouterFile
from pliant.routing.scorers.corrections import Corrections, WithCorrections, background_of

FEWEST = 20
"""Prompts to learn from. With fewer a correction is mostly shrunk away."""


@dataclass(frozen=True)
class Learned:
    """What a router learned."""

    prompts: int
    """Graded prompts that its corrections rest on, all in all."""
    new: int
    """Those that are new or graded anew: 0 if nothing has changed."""
    waiting: int
    """Explored prompts that still lack a grade."""
    error: float
    """The mean squared error of the gains that the router predicted for all these prompts before
    any of them was learned."""
    after: float
    """The same with what it has learned. These prompts were learned from, so it flatters: others
    like them are predicted less well."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        waiting = f" {self.waiting:,} explored prompts still lack grades." if self.waiting else ""
        if not self.new:
            return f"Nothing new: {self.prompts:,} graded prompts were learned before.{waiting}"
        return (
            f"Learned from {self.prompts:,} graded prompts, {self.new:,} of them new: on these the "
            f"squared error of the gain falls from {self.error:.3f} to {self.after:.3f}.{waiting}"
        )


def learn(router: str | Path, ledger: str | Path | None = None) -> Learned:
    """Correct a router's scorer by the explored and graded prompts of its ledger.

    The scorer's own files stay as they are; one file beside them is written, in one step. Routers
    that are open go on as before until they are loaded again. `ledger` names another ledger than
    the router's own.
    """
    folder = Path(router).expanduser()
    file = router_file.read(folder)
    with open_ledger(folder, ledger) as opened:
        outcomes, waiting = _labels(opened, file), _waiting(opened)
    with locked(folder):
        file, scorer = router_file.open_router(folder)
        place = folder / file.scorer.folder
        before: Corrections | None = None
        if isinstance(scorer, WithCorrections):
            before, scorer = scorer.corrections, scorer.scorer
        corrections = before
        if outcomes is not None:
            predictions = scorer.predict(outcomes.asked, outcomes.groups)
            salt = None if before is None else before.salt
            latest = Corrections.of(outcomes, predictions, background_of(place), salt)
            corrections = latest if before is None else before.merged(latest)
        if corrections is None or len(corrections) < FEWEST:
            raise InvalidInput(_too_few(0 if corrections is None else len(corrections), waiting))
        new = corrections.new_since(before)
        if new and outcomes is not None:
            fitted = file.fit_folder(folder)
            # Before the corrections: if this stops in between, the router is the old one, and a few
            # prompts too many are left out when it is measured.
            if (fitted / HASHES).exists():
                add_hashes(fitted, (), learned=outcomes.prompts)
            corrections.save(place)
    return Learned(len(corrections), new, waiting, *corrections.errors())


def labels(router: str | Path, ledger: str | Path | None = None) -> Outcomes:
    """The explored and graded prompts of a router's ledger as labels, to fit again with."""
    folder = Path(router).expanduser()
    file = router_file.read(folder)
    with open_ledger(folder, ledger) as opened:
        outcomes, waiting = _labels(opened, file), _waiting(opened)
    if outcomes is None:
        raise InvalidInput(_too_few(0, waiting))
    return outcomes


def open_ledger(router: str | Path, ledger: str | Path | None = None) -> Ledger:
    """The ledger of a router, or the one that is named; it must be there already."""
    folder = Path(router).expanduser()
    file, path = router_file.read(folder), None if ledger is None else Path(ledger).expanduser()
    if path is None and file.ledger.path is not None:
        path = folder / file.ledger.path
    if path is None:
        raise InvalidInput(f"{folder}: its ledger is in memory (ledger.path is null)")
    if not path.is_file():
        raise InvalidInput(f"{path}: there is no ledger: the router has not been asked yet")
    return Ledger(path)


def _too_few(graded: int, waiting: int) -> str:
    return (
        f"{graded} explored prompts have a grade for every model (and {waiting:,} lack some): "
        f"learning needs {FEWEST}. Set explore.share in router.json, ask, and grade the answers "
        "(pliant route grade)"
    )


def _waiting(ledger: Ledger) -> int:
    explored = ledger.grades.exploration()
    return int(explored["prompts"] - explored["graded"])


def _labels(ledger: Ledger, file: RouterFile) -> Outcomes | None:
    """A row for each prompt: one that was asked several times has the mean of its grades."""
    rows: dict[str, list[Labelled]] = {}
    for label in ledger.grades.labelled(file.names):
        rows.setdefault(label.hash, []).append(label)
    if not rows:
        return None

    def table(of: str) -> Any:
        return [
            [np.mean([getattr(label, of)[name] for label in asked]) for name in file.names]
            for asked in rows.values()
        ]

    latest = [asked[-1] for asked in rows.values()]
    groups = [label.group for label in latest]
    messages = tuple(label.messages for label in latest)
    return Outcomes(
        tuple(label.prompt for label in latest),
        file.names,
        table("right"),
        table("cost"),
        groups=None if None in groups else tuple(map(str, groups)),
        unit=file.unit,
        messages=messages if any(messages) else None,
    )
