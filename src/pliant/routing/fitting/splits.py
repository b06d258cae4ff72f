"""Split the labels by purpose for a fit: no row serves two purposes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pliant.errors import InvalidInput
from pliant.routing.outcomes import Outcomes

_LEAST = 200  # labels: five splits of fewer show nothing
_GROUPS = 5  # fewer cannot be split four to one


@dataclass(frozen=True, eq=False)
class Splits:
    """The splits of one label table."""

    train: Outcomes
    choice: Outcomes
    """To choose each scorer's capacity on; after that the scorer learns from it as well."""
    ladder: Outcomes
    """To compare the scorers on."""
    calibration: Outcomes
    """To calibrate probabilities and choose the threshold on; nothing else uses it."""
    test: Outcomes
    """Used once, at the end."""
    how: str
    """How the choice split differs from the training split, in words."""

    def sizes(self) -> dict[str, int]:
        names = ("train", "choice", "ladder", "calibration", "test")
        return {name: len(getattr(self, name)) for name in names}


def split(outcomes: Outcomes, seed: int = 0) -> Splits:
    """Half of the labels to learn from, the rest to choose, calibrate and test on.

    The choice split has another wording than the training split if the labels have wordings, else
    other groups if there are enough, else prompts like it: a capacity that is chosen on similar
    prompts overfits them. All wordings of a question stay in one split; if that prevents a choice
    split of another wording, it has other groups or other questions.
    """
    if len(outcomes) < _LEAST:
        raise InvalidInput(f"{len(outcomes)} labels: a fit needs {_LEAST} or more")
    fitted, ladder, calibration, test = outcomes.split((0.55, 0.15, 0.15, 0.15), seed)
    keys, how = _difference(fitted)
    train, choice = fitted.split((0.8, 0.2), seed) if keys is None else _apart(fitted, keys, seed)
    return Splits(train, choice, ladder, calibration, test, how)


def _difference(outcomes: Outcomes) -> tuple[tuple[str, ...] | None, str]:
    wordings, groups, questions = outcomes.wordings, outcomes.groups, outcomes.questions
    if wordings is not None and len(set(wordings)) > 1 and not _separated(questions, wordings):
        return wordings, "capacity is chosen on another wording than the scorers are trained on"
    if groups is not None and len(set(groups)) >= _GROUPS and not _separated(questions, groups):
        return groups, "capacity is chosen on other groups than the scorers are trained on"
    if questions is not None and len(set(questions)) < len(questions):
        return None, (
            "capacity is chosen on other questions than the scorers are trained on, in all their "
            "wordings: a split by wording or group would separate the wordings of a question"
        )
    return None, (
        "capacity is chosen on prompts like the training prompts: the labels have no wordings and "
        "too few groups to do better, so expect less on other prompts"
    )


def _separated(questions: tuple[str, ...] | None, keys: tuple[str, ...]) -> bool:
    """Whether a split by these keys would separate the wordings of a question."""
    if questions is None:
        return False
    return len(set(zip(questions, keys, strict=True))) > len(set(questions))


def _apart(outcomes: Outcomes, keys: tuple[str, ...], seed: int) -> tuple[Outcomes, Outcomes]:
    """The rows of most keys, and those of the others: a fifth of the rows or one key at least."""
    names = sorted(set(keys))
    np.random.default_rng(seed).shuffle(names)
    held: set[str] = set()
    for name in names[:-1]:
        held.add(name)
        if sum(key in held for key in keys) >= 0.2 * len(keys):
            break
    apart = np.array([key in held for key in keys])
    return outcomes.select(~apart), outcomes.select(apart)
