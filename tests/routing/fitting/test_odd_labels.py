"""Odd label tables: each gives a router that works, or one clear error; never a traceback."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.routing.labels import outcomes

from pliant.errors import PliantError
from pliant.routing import Router
from pliant.routing.fitting.calibrating import calibrate
from pliant.routing.fitting.evaluate import evaluate
from pliant.routing.fitting.fit import fit
from pliant.routing.outcomes import Outcomes

KINDS = ("random", "length", "group", "tfidf", "knn", "text")


def with_missing(models: int) -> Outcomes:
    """A third of the prompts were asked of one model alone, in turn; some of none."""
    labels = outcomes(180, 1, models=models)
    right = labels.right.copy()
    for i in range(0, 180, 3):
        right[i, np.arange(models) != i // 3 % models] = np.nan
    right[::30] = np.nan
    return replace(labels, right=right)


def constant(value: float, model: int, n: int = 120) -> Outcomes:
    labels = outcomes(n, 1)
    right = labels.right.copy()
    right[:, model] = value
    return replace(labels, right=right)


def every(value: float) -> Outcomes:
    labels = outcomes(100, 1)
    return replace(labels, right=np.full_like(labels.right, value))


def equal() -> Outcomes:
    labels = outcomes(100, 1, models=3)
    return replace(labels, right=np.repeat(labels.right[:, :1], 3, axis=1))


def at_one_price() -> Outcomes:
    labels = outcomes(120, 1, models=3)
    return replace(labels, cost=np.ones_like(labels.cost))


def texts(make: Callable[[int], str], n: int = 60) -> Outcomes:
    return replace(outcomes(n, 1), prompts=tuple(make(i) for i in range(n)), groups=None)


TABLES: dict[str, Callable[[], Outcomes]] = {
    "missing grades": lambda: with_missing(2),
    "missing grades of three": lambda: with_missing(3),
    "one group": lambda: replace(outcomes(100, 1), groups=("only",) * 100),
    "a group for each prompt": lambda: replace(outcomes(60, 1), groups=tuple(map(str, range(60)))),
    "fifty labels": lambda: outcomes(50, 1),
    "fifty labels of five models": lambda: outcomes(50, 1, models=5),
    "shares of right answers": lambda: replace(outcomes(80, 1), right=outcomes(80, 1).right / 3),
    "models that are equal": equal,
    "three models at one price": at_one_price,
    "a strong model that is always right": lambda: constant(1.0, 1),
    "a strong model that is right by halves": lambda: constant(0.5, 1),
    "a weak model that is always wrong": lambda: constant(0.0, 0),
    "no costs": lambda: replace(outcomes(80, 1), cost=np.zeros((80, 2))),
    "ten different prompts": lambda: texts(lambda i: f"prompt {chr(97 + i % 10)}"),
    "prompts that share no word": lambda: texts(lambda i: chr(0x4E00 + i), 120),
    "mostly one prompt": lambda: texts(lambda i: f"prompt {chr(97 + max(0, i - 50))}"),
    "prompts of one mark": lambda: texts(lambda i: "?" * (i + 1)),
    "one long word": lambda: texts(lambda i: "a" * (i + 1)),
}
REFUSED: dict[str, tuple[Callable[[], Outcomes], str]] = {
    "forty-nine labels": (lambda: outcomes(49, 1), "49 labels: a fit needs 50"),
    "all right": (lambda: every(1.0), "nothing to gain from routing"),
    "all wrong": (lambda: every(0.0), "no model is right on any"),
    "white space": (lambda: texts(lambda i: " " * i), "of 1 different prompts"),
    "one prompt": (lambda: texts(lambda i: "the same"), "of 1 different prompts"),
    "nothing asked of all": (
        lambda: replace(
            outcomes(80, 1),
            right=np.where(np.arange(160).reshape(80, 2) % 4 // 2 == [0, 1], 1.0, np.nan),
        ),
        "no prompt was asked of every model",
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_fit_gives_a_router_that_works_or_one_clear_error(name: str, tmp_path: Path) -> None:
    labels = TABLES[name]()
    backends = {model: f"openai:m@http://127.0.0.1:9{model[-1]}/v1" for model in labels.models}
    kinds = [kind for kind in KINDS if labels.groups or kind != "group"]
    try:
        made = fit(labels, tmp_path / "r", scorers=kinds, backends=backends, force=True)
    except PliantError as error:
        assert "\n" not in str(error) and not (tmp_path / "r").exists()
        assert name in ("models that are equal", "no costs"), error
        return
    made.predictions.check(made.splits.learn, made.selected.kind)
    assert str(made.verdict) and made.as_dict()
    with Router.load(made.folder, ledger=None) as router:
        assert router.choose(made.splits.test.prompts[0]).model in labels.models
        assert router.choose("Wie spät ist es denn?").model in labels.models
    assert evaluate(made.folder, labels).report.n == len(made.splits.test)
    goal = "95 % of the large model's quality"
    assert calibrate(made.folder, labels, goal, force=True).left_out == 0


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_fitted_is_refused_before_the_work(name: str, tmp_path: Path) -> None:
    table, words = REFUSED[name]
    with pytest.raises(PliantError, match=words) as error:
        fit(table(), tmp_path / "r", scorers=["text"], force=True)
    assert "\n" not in str(error.value) and not (tmp_path / "r").exists()
