"""A fit chooses nothing on its test split, times all that it does, and bounds its features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
from tests.routing.labels import outcomes
from tests.routing.minimal_scorer import Letters, content

from pliant.errors import InvalidInput
from pliant.routing import Router
from pliant.routing.fitting.fit import fit
from pliant.routing.fitting.ladder import continued_by, decision_ms
from pliant.routing.fitting.splits import split
from pliant.routing.outcomes import Outcomes
from pliant.routing.router_file import make as make_file
from pliant.routing.scorers import Predictions, Scorer, make
from pliant.routing.scorers.protocol import Prompts
from pliant.routing.scorers.stack import Stack
from pliant.routing.scorers.vectors import Reader, Vectors

BACKENDS = {f"model-{j}": name for j, name in enumerate(("nano-s", "nano-l", "nano-s"))}


def test_the_test_split_does_not_order_the_models(tmp_path: Path) -> None:
    labels = outcomes(200, 1, models=3)
    for seed in range(50):  # equal models, so that chance orders them
        right = (np.random.default_rng(seed).random((200, 3)) < 0.6).astype(float)
        labels = replace(labels, right=right)
        expected = split(labels).learn.by_quality().models
        if expected != labels.by_quality().models:
            break
    fitted = fit(labels, tmp_path / "r", scorers=["length"], backends=BACKENDS, force=True)
    assert fitted.file.names == expected != labels.by_quality().models
    assert fitted.file.default == expected[-1]


class Counting(Reader):
    """Reads each prompt as its length, and counts what it reads."""

    name, layers, model = "counting", (0,), None  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__()
        self.read_now = 0

    def compute(self, prompts: Prompts, layers: Sequence[int]) -> Vectors:
        self.read_now += len(prompts)
        return np.array([[[len(str(prompt))]] for prompt in prompts], dtype=np.float32)

    def flops(self, prompts: Prompts, layer: int) -> float:
        return 1.0


class Reading(Scorer):
    kind = "reading"

    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    def fit(self, train: Outcomes, choice: Outcomes | None = None, seed: int = 0) -> Self:
        return self

    def predict(self, prompts: Prompts, groups: Any = None) -> Predictions:
        self.reader.read(prompts, 0)
        return Predictions(None, np.zeros((len(prompts), 2)))


@pytest.mark.parametrize("stacked", [False, True])
def test_a_decision_is_timed_with_the_reading_of_its_prompt(stacked: bool) -> None:
    labels, reader = outcomes(20, 1), Counting()
    reader.remember(labels.asked)
    scorer: Scorer = Reading(reader)
    if stacked:
        scorer = Stack([scorer])
        scorer.mixture = lambda each: each[0]  # type: ignore[assignment]
    assert reader.read_now == 20
    decision_ms(scorer, labels)
    assert reader.read_now == 40, "each prompt anew"
    reader.read(labels.asked, 0)
    assert reader.read_now == 40, "and remembered as before"


def test_a_stack_continues_what_its_only_reading_member_does() -> None:
    cpx, local = make("cpx", base="nano-s"), {"small": "nano-s", "large": "nano-l"}
    assert continued_by(Stack([make("text"), cpx]), local) == "small"
    assert continued_by(Stack([make("text"), make("knn")]), local) is None


def test_a_share_is_refused_where_the_strongest_model_is_the_cheapest() -> None:
    entries = [{"name": "nano-s", "backend": "nano-s", "cost": 2.0}]
    entries += [{"name": "nano-l", "backend": "nano-l", "cost": 1.0}]
    threshold = {"on": "worth", "value": 0.0, "sentence": "the likelier"}
    file = make_file(**content(models=entries, threshold=threshold, shares=[0.0] * 21))
    router = Router(file, Letters())
    with pytest.raises(InvalidInput, match="nano-l is the strongest model and the cheapest"):
        router.choose("x", share=0.1)


def test_a_model_that_is_never_right_beside_one_that_always_is(tmp_path: Path) -> None:
    labels = outcomes(120, 1)
    sure = replace(labels, right=np.tile([0.0, 1.0], (120, 1)))
    kinds = ["random", "text"]
    fitted = fit(sure, tmp_path / "r", scorers=kinds, backends=BACKENDS_OF_TWO, force=True)
    assert fitted.evaluation.routed.quality.value == 1.0


BACKENDS_OF_TWO = {name: BACKENDS[name] for name in ("model-0", "model-1")}


def test_an_identifier_in_place_of_a_group_is_no_task() -> None:
    labels = replace(outcomes(60, 1), groups=tuple(str(i) for i in range(60)))
    scorer = make("text").fit(labels)
    assert scorer.tasks is None and make("text").fit(outcomes(60, 1)).tasks is not None
