"""Which labels serve which purpose in a fit: no row serves two of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pliant.errors import InvalidInput
from pliant.routing.outcomes import Outcomes

_LEAST = 200  # labels: five splits of fewer say nothing
_GROUPS = 5  # fewer cannot be parted four to one


@dataclass(frozen=True, eq=False)
class Parts:
    """The splits of one label table."""

    train: Outcomes
    choice: Outcomes
    """Where each scorer's capacity is chosen; after that the scorer learns from it as well."""
    ladder: Outcomes
    """Where the scorers are held against each other."""
    calibration: Outcomes
    """Where probabilities and the threshold are made: nothing was learned or chosen on it."""
    test: Outcomes
    """Looked at once, in the end."""
    how: str
    """In what the choice split differs from the training split, in words."""

    def sizes(self) -> dict[str, int]:
        names = ("train", "choice", "ladder", "calibration", "test")
        return {name: len(getattr(self, name)) for name in names}


def parts(outcomes: Outcomes, seed: int = 0) -> Parts:
    """Deal the labels out: half to learn from, the rest to choose, calibrate and test on.

    The choice split is of another wording than the training split where the labels have wordings,
    else of other groups where they have enough, else like it: a capacity that was chosen on like
    prompts overfits them. Wordings of one question are in one split, all of them: where that would
    part them, the choice split is of other groups, or of other questions.
    """
    if len(outcomes) < _LEAST:
        raise InvalidInput(f"{len(outcomes)} labels: a fit needs {_LEAST} or more")
    fitted, ladder, calibration, test = outcomes.split((0.55, 0.15, 0.15, 0.15), seed)
    keys, how = _difference(fitted)
    train, choice = fitted.split((0.8, 0.2), seed) if keys is None else _apart(fitted, keys, seed)
    return Parts(train, choice, ladder, calibration, test, how)


def _difference(outcomes: Outcomes) -> tuple[tuple[str, ...] | None, str]:
    wordings, groups, questions = outcomes.wordings, outcomes.groups, outcomes.questions
    if wordings is not None and len(set(wordings)) > 1 and not _parted(questions, wordings):
        return wordings, "capacity is chosen on another wording than is trained on"
    if groups is not None and len(set(groups)) >= _GROUPS and not _parted(questions, groups):
        return groups, "capacity is chosen on other groups than are trained on"
    if questions is not None and len(set(questions)) < len(questions):
        return None, (
            "capacity is chosen on other questions than are trained on, all wordings of each of "
            "them: by wordings or groups a question would be parted"
        )
    return None, (
        "capacity is chosen on prompts like those that are trained on: the labels have no wordings "
        "and too few groups to do better, so expect less on other prompts"
    )


def _parted(questions: tuple[str, ...] | None, keys: tuple[str, ...]) -> bool:
    """Whether a question would be parted where these keys are kept apart."""
    if questions is None:
        return False
    return len(set(zip(questions, keys, strict=True))) > len(set(questions))


def _apart(outcomes: Outcomes, keys: tuple[str, ...], seed: int) -> tuple[Outcomes, Outcomes]:
    """All but some of the keys, and those: a fifth of the rows or more, and at least one key."""
    names = sorted(set(keys))
    np.random.default_rng(seed).shuffle(names)
    held: set[str] = set()
    for name in names[:-1]:
        held.add(name)
        if sum(key in held for key in keys) >= 0.2 * len(keys):
            break
    other = np.array([key in held for key in keys])
    return outcomes.select(~other), outcomes.select(other)
