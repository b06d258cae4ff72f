"""Several scorers as one: the weighted sum of what they predict.

The weights come from out-of-fold predictions, so that a scorer that fits its own labels too closely
gets no credit for it. A scorer joins only if it is shown to lower the error of those already there:
with few labels the best single scorer stays alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from pliant.errors import CorruptFile
from pliant.routing.outcomes import Outcomes
from pliant.routing.prompts import Prompt
from pliant.routing.scorers.protocol import (
    Folds,
    Groups,
    Partitions,
    Predictions,
    Prefilling,
    Prompts,
    Scorer,
    State,
    read_state,
)
from pliant.stats import Floats, as_difference

_MOST = 4
"""Members; each takes time at every decision."""
_SHOWN = 1.28
"""Standard errors by which the error must fall for another member: 90 %, one-sided."""


@dataclass(frozen=True, eq=False)
class Mixture:
    """How much each member counts for the gain, and what is added for each model."""

    weights: Floats
    """(members,) 0 or more."""
    bias: Floats
    """(m,) its first entry 0."""

    @classmethod
    def fit(cls, members: Sequence[Predictions], right: Floats) -> Mixture:
        """By least squares with weights that are not negative."""
        from scipy.optimize import nnls

        true = right - right[:, :1]
        centred = [(p.gain - p.gain.mean(axis=0)).ravel() for p in members]
        weights, _ = nnls(np.stack(centred, axis=1), (true - true.mean(axis=0)).ravel())
        means = np.stack([p.gain.mean(axis=0) for p in members])
        bias = true.mean(axis=0) - weights @ means
        return cls(weights, bias)

    def __call__(self, members: Sequence[Predictions]) -> Predictions:
        gain = sum(w * p.gain for w, p in zip(self.weights, members, strict=True)) + self.bias
        rights = [p.right for p in members]
        known = [(w, r) for w, r in zip(self.weights, rights, strict=True) if r is not None]
        total = sum(w for w, _ in known)
        right = np.clip(sum(w * r for w, r in known) / total, 0, 1) if total > 0 else None
        return Predictions(right, as_difference(gain))


class Stack(Scorer):
    """Scorers that are fitted one by one, and predict together."""

    kind = "stack"

    def __init__(self, members: Sequence[Scorer] = (), mixture: Mixture | None = None) -> None:
        self.members = list(members)
        self.mixture = mixture
        self.needs_groups = any(member.needs_groups for member in members)  # type: ignore[misc]

    def cross_validate(
        self, outcomes: Outcomes, partitions: Partitions, seed: int = 0
    ) -> Predictions:
        each = [member.cross_validate(outcomes, partitions, seed) for member in self.members]
        self.mixture = Mixture.fit(each, outcomes.right)
        return out_of_fold(each, outcomes.right, partitions[0])

    def fit(self, train: Outcomes, choice: Outcomes | None = None, seed: int = 0) -> Self:
        for member in self.members:
            member.fit(train, choice, seed)
        return self

    def predict(self, prompts: Prompts, groups: Groups = None) -> Predictions:
        assert self.mixture is not None, "not fitted"
        return self.mixture([member.predict(prompts, groups) for member in self.members])

    def while_answering(self, prompt: Prompt) -> Prefilling | None:
        """The offer of the one member that reads a model that answers; the others read the text."""
        offers = [getattr(member, "while_answering", None) for member in self.members]
        if sum(offer is not None for offer in offers) != 1:
            return None
        at = next(i for i, offer in enumerate(offers) if offer is not None)
        inner: Prefilling | None = offers[at](prompt)  # type: ignore[misc]
        if inner is None:
            return None

        def predictions(scores: Any) -> Predictions:
            assert self.mixture is not None and inner is not None
            return self.mixture([
                inner.predictions(scores) if i == at else member.predict([prompt])
                for i, member in enumerate(self.members)
            ])  # fmt: skip

        return replace(inner, predictions=predictions)

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(member.kind for member in self.members)

    def flops(self, prompts: Prompts) -> float:
        return sum(member.flops(prompts) for member in self.members)

    def chosen(self) -> dict[str, Any]:
        assert self.mixture is not None
        weights = self.mixture.weights.round(3).tolist()
        return {"weights": dict(zip(self.kinds, weights, strict=True))}

    def state(self) -> State:
        assert self.mixture is not None
        return State({"members": list(self.kinds)}, dict(vars(self.mixture)))

    def save(self, folder: Path) -> None:
        for i, member in enumerate(self.members):
            member.save(folder / f"member-{i}")
        super().save(folder)

    @classmethod
    def load(cls, folder: Path, device: str | None = None) -> Self:
        from pliant.routing.scorers import load

        state = read_state(folder, cls.kind)
        kinds: Sequence[str] = state.settings["members"]
        members = [load(folder / f"member-{i}", device) for i in range(len(kinds))]
        if [member.kind for member in members] != list(kinds):
            raise CorruptFile(f"{folder}: its members are not {', '.join(kinds)}")
        return cls(members, Mixture(state.arrays["weights"], state.arrays["bias"]))


def out_of_fold(each: Sequence[Predictions], right: Floats, folds: Folds) -> Predictions:
    """The mixture of out-of-fold predictions, each fold by weights from the others."""
    gain = np.zeros_like(right)
    rights: Floats | None = np.zeros_like(right)
    for fold in folds:
        rest = np.setdiff1d(np.arange(len(right)), fold)
        mixture = Mixture.fit([p.select(rest) for p in each], right[rest])
        predicted = mixture([p.select(fold) for p in each])
        gain[fold] = predicted.gain
        if rights is None or predicted.right is None:
            rights = None
        else:
            rights[fold] = predicted.right
    return Predictions(rights, gain)


def chosen_members(
    each: Mapping[str, Predictions], first: str, right: Floats, folds: Folds
) -> list[str]:
    """The best scorer, and those that are shown to lower its error, one after the other."""
    members = [first]

    def errors_of(*names: str) -> Floats:
        """Alone, a scorer is weighted as well: a copy of it must not join because of that."""
        return _errors(out_of_fold([each[name] for name in names], right, folds).gain, right)

    errors = errors_of(first)
    while len(members) < _MOST:
        tried = {name: errors_of(*members, name) for name in each if name not in members}
        if not tried:
            break
        name = min(tried, key=lambda n: tried[n].mean())
        less = errors - tried[name]
        if not less.mean() > _SHOWN * less.std() / np.sqrt(len(less)):
            break
        members.append(name)
        errors = tried[name]
    return members


def _errors(gain: Floats, right: Floats) -> Floats:
    errors: Floats = ((gain - (right - right[:, :1])) ** 2)[:, 1:].mean(axis=1)
    return errors
