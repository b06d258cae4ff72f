"""Routing from Python in three calls: `pliant.route` is what the command line calls."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.in_process import pliant as pliant_command
from tests.routing.labels import outcomes

import pliant
from pliant import Router, nano, route
from pliant.data import read_rows, write_rows
from pliant.errors import InvalidInput, PliantError
from pliant.routing import scorers
from pliant.routing.fitting.fit import SavesNothing
from pliant.routing.labels.label import backend_descriptions


def test_three_calls_lead_from_prompts_to_a_measured_router(tmp_path: Path) -> None:
    """The labels' own backends reach the router, so nothing has to be named twice."""
    rows = [{"prompt": q.prompt, "answer": q.answer} for q in nano.questions("dev", 260, seed=1)]
    write_rows(tmp_path / "q.jsonl", rows[:220])
    labels = route.label(tmp_path / "q.jsonl", models=["nano-s", "nano-l"], max_new_tokens=24)
    assert labels.path == tmp_path / "q.labels.jsonl" and labels.rows == 220
    tokens = [model.used.prompt_tokens + model.used.answer_tokens for model in labels.models]
    small, large = (model.used.flops for model in labels.models)
    assert min(tokens) > 220 * 5 and large > 2 * small > 0 and labels.cost == small + large
    goal = "50 % of calls"
    fitted = route.fit(labels, tmp_path / "r", scorers=["tfidf"], goal=goal, force=True)
    assert fitted.file.names == ("nano-s", "nano-l") and fitted.file.label_cost["nano-l"]["flops"]
    held = route.label(rows[220:], ["nano-s", "nano-l"], tmp_path / "held.jsonl", max_new_tokens=24)
    evaluation = route.evaluate(fitted, held)
    assert evaluation.report.n == 40 and evaluation.left_out == 0
    verdict = evaluation.verdict
    assert verdict is not None and 0 < verdict.shares[1] < 1
    strong, weak = (
        np.array([row["right"][m] for row in read_rows(held.path)]) for m in ("nano-l", "nano-s")
    )
    most = np.maximum(strong, weak).mean() / strong.mean()
    assert 0 < verdict.of_quality.value <= most and verdict.cost < verdict.strongest_cost
    assert verdict.cheapest_of_quality == pytest.approx(weak.mean() / strong.mean())
    with Router.load(tmp_path / "r", ledger=None) as router:
        assert router.ask("what is 2+2", max_new_tokens=4).model in fitted.file.names


def test_a_function_of_one_s_own_grades(tmp_path: Path) -> None:
    done = route.label(
        [{"prompt": "what is 2+2"}], ["nano-s"], tmp_path / "l.jsonl", max_new_tokens=4,
        verifier=lambda answer: 1.0,
    )  # fmt: skip
    assert [row["right"] for row in read_rows(done.path)] == [{"nano-s": 1.0}]


def test_tables_of_other_columns_are_fitted_and_measured(tmp_path: Path) -> None:
    for name, labels in (("a", outcomes(300, 1)), ("b", outcomes(100, 2))):
        labels.write(tmp_path / f"{name}.jsonl")
        rows = [
            {
                "text": row["prompt"],
                "graded": {
                    model: {"correct": right, "price": row["cost"][model]}
                    for model, right in row["right"].items()
                },
            }
            for row in read_rows(tmp_path / f"{name}.jsonl")
        ]
        write_rows(tmp_path / f"{name}.jsonl", rows)
    columns = {"prompt": "text", "right": "graded", "cost": "price", "unit": "usd"}
    fitted = route.fit(
        tmp_path / "a.jsonl",
        tmp_path / "r",
        columns=columns,
        scorers=["tfidf"],
        goal="60 % of calls",
    )
    assert fitted.file.unit == "usd" and "machine of the fit" in fitted.verdict.scoring_note
    assert route.evaluate(tmp_path / "r", tmp_path / "b.jsonl", columns=columns).report.n == 100
    with pytest.raises(InvalidInput, match="no column 'right'"):
        route.evaluate(tmp_path / "r", tmp_path / "b.jsonl", columns={"prompt": "text"})


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"goal": "5 ms a call"}, "are in calls, not ms"),
        ({"calibrate_by": "plat"}, "did you mean 'platt'"),
        ({"backends": {"model-0": "./nowhere"}}, "nowhere"),
        ({"backends": {"model-9": "nano-s"}}, "no model 'model-9'"),
    ],
)
def test_what_is_wrong_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: dict[str, object], words: str
) -> None:
    def work(*_: object) -> None:
        raise AssertionError("a scorer was fitted")

    monkeypatch.setattr("pliant.routing.fitting.fit.climb", work)
    with pytest.raises(PliantError, match=words):
        route.fit(outcomes(300, 1), tmp_path / "r", scorers=["length"], **wrong)


def test_few_labels_say_how_many_are_missing(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="40 labels: a fit needs 50 or more, so label 10 more"):
        route.fit(outcomes(40, 1), tmp_path / "r")
    with pytest.raises(SavesNothing):
        route.fit(replace(outcomes(300, 1), unit="ms"), tmp_path / "r", scorers=["length"])


def test_a_single_name_is_not_its_letters(tmp_path: Path) -> None:
    rows = [{"prompt": "what is 2+2", "answer": "4"}]
    done = route.label(rows, "nano-s", tmp_path / "l.jsonl", max_new_tokens=4, stop="nano-s")
    assert [model.name for model in done.models] == ["nano-s"] and str(done).startswith("Of 1 ")
    fitted = route.fit(outcomes(300, 1), tmp_path / "r", scorers="length", force=True)
    assert [rung.kind for rung in fitted.rungs] == ["length"]


def test_what_is_missing_or_misspelt_is_named_as_python_and_the_command_line_have_it(
    tmp_path: Path,
) -> None:
    out = tmp_path / "l.jsonl"
    with pytest.raises(InvalidInput, match="there are no prompts to label"):
        route.label([], ["nano-s"], out)
    with pytest.raises(InvalidInput, match='verifier="judge" and judge=MODEL .*--judge MODEL'):
        route.label([{"prompt": "?"}], ["nano-s"], out, verifier="judge")
    with pytest.raises(InvalidInput, match="columns: no 'promt'; did you mean 'prompt'"):
        route.fit(out, tmp_path / "r", columns={"promt": "text"})
    assert not out.exists()


def test_labels_without_a_place_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="name the file of the labels"):
        route.label([{"prompt": "?"}], models=["nano-s"])
    with pytest.raises(InvalidInput, match="name the file of the labels"):
        route.label("no-such-questions.jsonl", models=["nano-s"])
    with pytest.raises(InvalidInput, match="prices: no model 'nano-m'; did you mean"):
        route.label([{"prompt": "?"}], ["nano-s"], tmp_path / "l.jsonl", prices={"nano-m": "1,2"})


OWN = """
import numpy as np
from pliant.routing.scorers import Predictions, Scorer
from pliant.routing.scorers.protocol import State

class Times(Scorer):
    kind = "times"
    most = 0.9

    def fit(self, train, choice=None, seed=0):
        return self

    def predict(self, prompts, groups=None):
        gain = np.array([[0.0, self.most * ("times" in str(prompt))] for prompt in prompts])
        return Predictions(None, gain)

    def state(self):
        return State()

    def load_state(self, state):
        pass

class Wild(Times):
    kind, most = "wild", 1.5
"""


def test_a_scorer_of_one_s_own_is_named_by_its_place(tmp_path: Path) -> None:
    """Its file is imported because the user names it, never because a router does."""
    (tmp_path / "mine.py").write_text(OWN)
    outcomes(300, 1).write(tmp_path / "labels.jsonl")

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        scorers._registered.clear()  # as in a new process
        return pliant_command("route", *words, cwd=tmp_path)

    words = ["--labels", "labels.jsonl", "--goal", "40 % of calls", "--out", "r"]
    backends = ["--backend", "model-0=nano-s", "--backend", "model-1=nano-l"]
    done = run("fit", *words, *backends, "--scorer", "mine.py:Times", "--scorer", "length")
    assert done.returncode == 0 and "Selected: times" in done.stdout, done.stderr
    known = next(prompt for prompt in outcomes(300, 1).prompts if "times" in prompt)
    ask = ["ask", "--router", "r", "--choose", known]
    unnamed = run(*ask)
    assert unnamed.returncode == 2 and "--scorer MODULE:CLASS" in unnamed.stderr
    named = run(*ask, "--scorer", "mine.py:Times")
    assert named.returncode == 0 and "gain +0.900" in named.stdout, named.stderr
    none = run(*ask, "--scorer", "mine.py:Times", "--share", "0")
    assert none.stdout.startswith("model-0 | ")
    wild = run("fit", *words, "--scorer", "mine.py:Wild")
    assert wild.returncode == 2 and "'wild': a gain is a difference" in wild.stderr
    index = next((tmp_path / "r").glob("fit-*/scorer/scorer.json"))
    index.write_text(index.read_text().replace('"times"', '"mine:Times"'))
    router = tmp_path / "r" / "router.json"
    router.write_text(router.read_text().replace('"times"', '"mine:Times"'))
    assert "name its class first" in run(*ask, "--scorer", "mine.py:Times").stderr


def test_what_is_no_scorer_is_not_registered() -> None:
    for wrong in (dict, scorers.Scorer, scorers.kind_class("text"), "text"):
        with pytest.raises(InvalidInput, match="subclass of"):
            scorers.register(wrong)
    with pytest.raises(InvalidInput, match="did you mean 'text'"):
        scorers.kind_class("texd")


def test_importing_it_is_light() -> None:
    code = "import sys; from pliant import route; import pliant; assert pliant.route is route; "
    code += "print([m for m in ('torch', 'numpy', 'sklearn') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.replace("'", '"')) == [] and "route" in dir(pliant)


@pytest.mark.parametrize("reached", ["openai", {"price": [1, 2]}, {"backend": "b", "price": 3}])
def test_labels_that_somebody_has_edited_are_named_by_row(tmp_path: Path, reached: object) -> None:
    path = tmp_path / "labels.jsonl"
    write_rows(path, [{"prompt": "a"}, {"prompt": "b", "reached": {"small": reached}}])
    with pytest.raises(InvalidInput, match=r"labels.jsonl, row 2: reached = .* is not what"):
        backend_descriptions(path)
