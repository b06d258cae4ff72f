"""`pliant route grade` and `learn`: from explored answers to a router that knows a new task."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.in_process import pliant
from tests.routing.labels import outcomes
from tests.routing.live.test_grades import answered
from tests.routing.minimal_scorer import content
from tests.routing.scorers.test_corrections import noticing

from pliant import nano
from pliant.data import read_rows
from pliant.routing import Outcomes
from pliant.routing.live.ledger import Ledger
from pliant.routing.router import Router
from pliant.routing.router_file import make
from pliant.routing.scorers.corrections import write_background

QUESTIONS = nano.questions("test", 20, seed=3)


@pytest.fixture(scope="module")
def explored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A router on nano that was fitted on other prompts, and has asked both of nano's questions."""
    place = tmp_path_factory.mktemp("learning")
    train = outcomes(300, 1)
    train = Outcomes(train.prompts, ("nano-s", "nano-l"), train.right, 1 + 4 * train.cost)
    stated: dict[str, Any] = {"explore": {"share": 1.0}, "ledger": {"prompts": True}}
    Router(make(**content(scorer={"kind": "text"}, **stated)), noticing(train)).save(
        place / "router"
    )
    write_background(place / "router" / "scorer", train.prompts)
    with Router.load(place / "router") as router:
        replies = [router.ask(each.prompt, max_new_tokens=6) for each in QUESTIONS]
    assert {(reply.model, reply.explored) for reply in replies} == {("nano-l", ("nano-s",))}
    return place


def test_from_answers_to_a_router_that_has_learned(explored: Path) -> None:
    too_few = pliant("route", "learn", "--router", "router", cwd=explored)
    assert too_few.returncode == 2 and "0 explored prompts have a grade" in too_few.stderr
    listed = pliant("route", "grade", "--router", "router", "--ungraded", "u.jsonl", cwd=explored)
    assert listed.returncode == 0 and "40 answers without a grade in u.jsonl" in listed.stdout
    references = {each.prompt: each.answer for each in QUESTIONS}
    rows = read_rows(explored / "u.jsonl")
    for row in rows[:-1]:
        row["right"] = row["answer"].strip() == references[row["prompt"]]
    (explored / "g.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    graded = pliant("route", "grade", "--router", "router", "--grades", "g.jsonl", cwd=explored)
    assert graded.returncode == 0 and "39 answers graded. 1 rows without" in graded.stdout
    assert "19 of 20 explored prompts" in graded.stdout and "grading: " in graded.stderr
    by_prompt = {**rows[-1], "id": None, "right": 1}
    (explored / "p.json").write_text(json.dumps([by_prompt, {**by_prompt, "prompt": "?"}]))
    words = ("route", "grade", "--router", "router", "--grades", "p.json", "--json")
    assert json.loads(pliant(*words, cwd=explored).stdout) == {
        **{"graded": 1, "skipped": 0, "unknown": 1, "explored": 20, "complete": 20}
    }
    words = ("route", "learn", "--router", "router", "--labels-out", "more.jsonl")
    learned = pliant(*words, cwd=explored)
    assert learned.returncode == 0, learned.stderr
    assert "Learned from 20 graded prompts, 20 of them new" in learned.stdout
    assert Outcomes.read(explored / "more.jsonl").models == ("nano-s", "nano-l")
    again = json.loads(pliant(*words, "--json", cwd=explored).stdout)
    assert (again["prompts"], again["new"], again["labels"]) == (20, 0, "more.jsonl")
    with Router.load(explored / "router") as router:
        novel = [router.choose(each.prompt).novel for each in QUESTIONS]
    assert sum(novel) <= 4, "what was learned is familiar"


@pytest.mark.parametrize(
    ("reference", "columns"),
    [
        ({"prompt": "new", "answer": "5"}, []),
        ({"q": "new", "a": "5"}, ["--prompt-column", "q", "--answer-column", "a"]),
        (
            {"chat": [{"from": "human", "value": "new"}, {"from": "gpt", "value": "5"}]},
            ["--messages-column", "chat"],
        ),
    ],
    ids=["plain", "named", "conversation"],
)
def test_a_verifier_grades_what_is_left(
    explored: Path, tmp_path: Path, reference: dict[str, object], columns: list[str]
) -> None:
    shutil.copytree(explored / "router", tmp_path / "router")
    with Ledger(tmp_path / "router/ledger.sqlite", prompts=True) as ledger:
        row = answered(ledger, "new", "nano-l")
        ledger.grades.explored(row, "new", None, {"nano-l": ("5", 5.0), "nano-s": ("7", 1.0)}, [])
        other = answered(ledger, "other", "nano-l")
        ledger.grades.explored(other, "other", None, {"nano-l": ("5", 5.0)}, [])
    (tmp_path / "r.jsonl").write_text(json.dumps(reference))
    words = ("route", "grade", "--router", "router", "--verifier", "exact")
    assert "needs --references" in pliant(*words, cwd=tmp_path).stderr
    ignored = pliant(*words[:-1], "grade.py:right", "--prompt-column", "q", cwd=tmp_path)
    assert ignored.returncode == 2 and "--prompt-column names a column of" in ignored.stderr
    done = pliant(*words, "--references", "r.jsonl", *columns, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with Ledger(tmp_path / "router/ledger.sqlite") as ledger:
        rights = {each.model: each.right for each in ledger.grades.answers() if each.row == row}
        assert rights == {"nano-l": 1.0, "nano-s": 0.0}
        assert [each.row for each in ledger.grades.answers(graded=False)][-1] == other
    assert "answers have no reference" in done.stdout
    (tmp_path / "grade.py").write_text("def right(answer): return float(len(answer) == 1)")
    own = pliant(*words[:-1], "grade.py:right", "--json", cwd=tmp_path)
    assert json.loads(own.stdout)["no reference"] == 0


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"id": 999, "right": True}], "no decision 999"),
        ([{"id": 1, "right": 2}], "row 1: right=2"),
        ([{"id": 1, "right": "maybe"}], "row 1: "),
        ([{"id": 1, "model": "nano", "right": 1}], "no answer of 'nano'; did you mean"),
        ([{"prompt": "2+2", "right": 1}], "row 1: a grade needs an id, or a prompt and a model"),
        ([{"prompt": "?", "model": "nano-s", "right": 1}], "none of its 1 rows grades"),
        ([{"id": 1}], "'right'"),
    ],
)
def test_grades_that_fit_no_answer_are_refused(
    explored: Path, rows: list[dict[str, Any]], expected: str
) -> None:
    (explored / "wrong.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("route", "grade", "--router", "router", "--grades", "wrong.jsonl")
    result = pliant(*words, cwd=explored)
    assert result.returncode == 2 and expected in result.stderr
    assert result.stdout == "" and result.stderr.count("error: ") == 1


def test_grading_needs_something_to_do(explored: Path) -> None:
    result = pliant("route", "grade", "--router", "router", cwd=explored)
    assert result.returncode == 2 and "--ungraded FILE" in result.stderr
    result = pliant("route", "learn", "--router", "nowhere", cwd=explored)
    assert result.returncode == 2 and "no router.json" in result.stderr
