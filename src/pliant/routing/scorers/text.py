"""The best scorer on the text alone: what a prompt is about, how it looks, and both together.

Where the labels have groups it infers a prompt's task. The group of a prompt says more about who is
right than its words do, but few callers know it. So a first regression tells the groups of the
training prompts apart, and how likely each of them is becomes one more block of features: each task
has a mean of its own, shrunk towards what the text alone says.

benchmarks/routing_labels.py compares it with plain scorers of the text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, ClassVar, Self

import numpy as np

from pliant.errors import InvalidInput
from pliant.routing.outcomes import Outcomes
from pliant.routing.prompts import text_of
from pliant.routing.scorers.blocks import (
    DIRECT,
    Blocks,
    Weights,
    cross_validated,
    out_of_fold,
    solve,
)
from pliant.routing.scorers.features import Surface, Topics, Words
from pliant.routing.scorers.linear import one_partition, together
from pliant.routing.scorers.protocol import (
    Groups,
    Partitions,
    Predictions,
    Prompts,
    Scorer,
    State,
    gains,
)
from pliant.stats import Floats, as_difference

# Chosen on halves of the label sets, by APGR on the other halves, means of three to five: 32, 64
# and 128 topics have .638, .647 and .650 with 700 labels of GSM8K, .622, .625 and .628 with 300,
# .645, .647 and .648 with 500 of MMLU, and .677, .678 and .677 with 2,000.
TOPICS, WAVES = 64, 200
_GROUP = 0.7
"""The weight of a group's column."""
# Of the tasks: the penalty, how sharp the probabilities are, and their weight. On the same samples
# of MMLU: with a sharpness of 20 there is no gain, and weights of 1 and 2 ** .5 are within .001.
_PENALTY, _SHARPNESS, _TASKS = 1.0, 6.0, 2.0**0.5
_MOST_TASKS, _LEAST = 200, 5
"""Tasks, and prompts of one: an identifier in place of a group would fill the memory."""


class Text(Scorer):
    """Ridge regression of each model's grade on words, surface, and topics times surface."""

    kind = "text"
    words: Words
    topics: Topics
    surface: Surface
    weights: Weights
    infers_tasks: ClassVar[bool] = True
    tasks: Weights | None = None
    """Tell the groups of the labels apart; None where there are none, or only one."""
    groups: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.strength: float | None = None
        """The penalty; None before it is chosen."""
        self._prepared: tuple[Outcomes, Blocks] | None = None

    def cross_validate(
        self, outcomes: Outcomes, partitions: Partitions, seed: int = 0
    ) -> Predictions:
        x = self._prepare(outcomes, seed)
        self._prepared = outcomes, x
        self.strength, right = cross_validated(x, outcomes.right, partitions)
        return _predictions(right)

    def fit(self, train: Outcomes, choice: Outcomes | None = None, seed: int = 0) -> Self:
        everything = together(train, choice)
        before, self._prepared = self._prepared, None
        x = before[1] if before and before[0] is everything else self._prepare(everything, seed)
        if self.strength is None:
            partitions = one_partition(everything, seed)
            self.strength, _ = cross_validated(x, everything.right, partitions)
        self.weights = solve(x, everything.right, self.strength)
        return self

    def predict(self, prompts: Prompts, groups: Groups = None) -> Predictions:
        return _predictions(self.weights(self._blocks(prompts, groups)))

    def chosen(self) -> dict[str, Any]:
        return {"strength": self.strength}

    def state(self) -> State:
        state = self.words.state()
        state.settings |= {"groups": list(self.groups), "strength": self.strength}
        state.arrays |= {f"topics.{name}": x for name, x in self.topics.arrays().items()}
        state.arrays |= {f"surface.{name}": x for name, x in self.surface.arrays().items()}
        state.arrays |= self.weights.arrays("weights.")
        state.arrays |= {} if self.tasks is None else self.tasks.arrays("tasks.")
        return state

    def load_state(self, state: State) -> None:
        if "weights.products" not in state.arrays:
            raise InvalidInput(
                f"a {self.kind} scorer of an older Pliant, which this one replaced: fit again"
            )
        arrays = {name: x.astype(np.float64) for name, x in state.arrays.items()}
        self.words = Words.from_state(state)
        self.topics = Topics(*(arrays[f"topics.{each.name}"] for each in fields(Topics)))
        self.surface = Surface(*(arrays[f"surface.{each.name}"] for each in fields(Surface)))
        self.weights = Weights.from_arrays(arrays, "weights.")
        self.tasks = Weights.from_arrays(arrays, "tasks.") if "tasks.bias" in arrays else None
        self.groups = tuple(state.settings["groups"])
        self.strength = state.settings["strength"]
        both = [self.weights] if self.tasks is None else [self.weights, self.tasks]
        waves, words = len(self.surface.phase), len(state.settings["words"])
        if any(x.words.shape[0] != words or x.products.shape[2] != waves for x in both):
            raise ValueError(f"weights that are not of {words} words and {waves} waves")
        if self.kind in (Text.kind, TextAndGroup.kind):  # others have features besides
            columns = len(self.groups) if self.tasks is None else len(self.tasks.bias)
            if self.weights.dense.shape[0] != waves + columns:
                raise ValueError(f"weights that are not of {waves} waves and {columns} groups")

    def _prepare(self, outcomes: Outcomes, seed: int) -> Blocks:
        """The features of the training prompts, which the features are fitted on."""
        texts = [text_of(prompt) for prompt in outcomes.prompts]
        self.words = Words().fit(texts)
        self.topics = Topics.of(self.words(texts), TOPICS)
        self.surface, self.tasks = Surface.of(texts, WAVES, seed), None
        x = self._features(outcomes.asked, outcomes.groups)
        names = _tasks(outcomes.groups or ()) if self.infers_tasks else ()
        if len(names) < 2:
            return x
        # How likely a prompt's task is comes from a fit that had not seen it: what its own fit says
        # would be surer than it will be of other prompts.
        rows = np.sort(np.random.default_rng(seed).permutation(len(x))[:DIRECT])
        known, at = x.select(rows), one_hot(outcomes.groups, names)[rows]
        self.tasks = solve(known, at, _PENALTY)
        likely = self.tasks(x)
        parts = one_partition(outcomes.select(rows), seed)[0]
        likely[rows] = out_of_fold(known, at, parts, _PENALTY)
        return _with_tasks(x, likely)

    def _blocks(self, prompts: Prompts, groups: Groups) -> Blocks:
        x = self._features(prompts, groups)
        return x if self.tasks is None else _with_tasks(x, self.tasks(x))

    def _features(self, prompts: Prompts, groups: Groups) -> Blocks:
        """All but the inferred task."""
        texts = [text_of(prompt) for prompt in prompts]
        words, waves = self.words(texts), self.surface(texts)
        return Blocks(words, waves, self.topics(words), waves)


class TextAndGroup(Text):
    """Text that also uses each prompt's group, which must be known when routing, too."""

    kind = "text+group"
    needs_groups = True
    infers_tasks = False

    def _prepare(self, outcomes: Outcomes, seed: int) -> Blocks:
        self.groups = tuple(sorted(set(outcomes.groups or ())))
        return super()._prepare(outcomes, seed)

    def _features(self, prompts: Prompts, groups: Groups) -> Blocks:
        x = super()._features(prompts, groups)
        columns = one_hot(groups or [""] * len(prompts), self.groups)
        return Blocks(x.words, np.hstack([x.dense, _GROUP * columns]), x.topics, x.waves)


def _tasks(groups: Sequence[str]) -> tuple[str, ...]:
    """The largest groups: one of a few prompts is no task that others could belong to."""
    counts = Counter(groups)
    names = [name for name, n in counts.most_common(_MOST_TASKS) if n >= _LEAST]
    return tuple(sorted(names))


def _with_tasks(x: Blocks, predicted: Floats) -> Blocks:
    likely = np.exp(_SHARPNESS * (predicted - predicted.max(axis=1, keepdims=True)))
    likely /= likely.sum(axis=1, keepdims=True)
    return Blocks(x.words, np.hstack([x.dense, _TASKS * likely]), x.topics, x.waves)


def one_hot(groups: Groups, names: tuple[str, ...]) -> Floats:
    """(n, names) 1 in the column of each prompt's group; the row of an unknown group is empty."""
    at = {name: j for j, name in enumerate(names)}
    columns = np.zeros((len(groups or ()), len(names)))
    for i, group in enumerate(groups or ()):
        if group in at:
            columns[i, at[group]] = 1
    return columns


def _predictions(right: Floats) -> Predictions:
    return Predictions(np.clip(right, 0.0, 1.0), as_difference(gains(right)))
