"""Grades: an answer can be graded at any time, and a prompt with a grade for each is a label."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest

from pliant.errors import InvalidInput
from pliant.routing.backends import Used
from pliant.routing.live.decision import Decision, Reply
from pliant.routing.live.ledger import Ledger


def answered(ledger: Ledger, prompt: Any, model: str = "b", cost: float = 5.0) -> int:
    decision = Decision(model, 0.5, 0.1, "because", model, novel=True)
    row, _ = ledger.record(prompt, None, decision, cost, 0.0)
    used = Used(calls=1, prompt_tokens=3, answer_tokens=2, ms=1.0)
    ledger.answered(row, Reply("text", decision, cost, 0.0, "calls", used, ("text",)))
    return row


def explored(ledger: Ledger, prompt: Any, group: str | None = None) -> int:
    row = answered(ledger, prompt)
    ledger.grades.explored(row, prompt, group, {"b": ("four", 5.0), "a": ("4", 1.0)}, [])
    return row


def test_a_returned_answer_is_graded_and_the_latest_grade_counts() -> None:
    with Ledger(None) as ledger:
        row = answered(ledger, "p")
        ledger.grades.grade(row, True)
        ledger.grades.grade(row, 0.25)
        assert ledger.report().graded == 1
        assert ledger.grades.labelled(["a", "b"]) == [], "the other model was not asked"


def test_an_explored_prompt_is_a_label_once_every_answer_is_graded() -> None:
    talk = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "2+2"}]
    with Ledger(None, prompts=True) as ledger:
        first, second = explored(ledger, "2+2", "sums"), explored(ledger, talk)
        for row in (first, second):
            ledger.grades.grade(row, False, "a")
        ledger.grades.grade(first, True)
        (label,) = ledger.grades.labelled(["a", "b"])
        assert (label.prompt, label.group, label.messages) == ("2+2", "sums", None)
        assert (label.right, label.cost) == ({"a": 0.0, "b": 1.0}, {"a": 1.0, "b": 5.0})
        ledger.grades.grade(second, True)
        assert ledger.grades.labelled(["a", "b"])[1].messages == tuple(talk)
        assert ledger.grades.labelled(["a", "b", "c"]) == []


def test_exploring_is_paid_for_in_the_totals() -> None:
    with Ledger(None, prompts=True) as ledger:
        row = explored(ledger, "p")
        answered(ledger, "q", cost=3.0)
        totals = ledger.report()
        assert (totals.cost, totals.saved) == (5 + 3 + 1, -1)
        assert totals.exploration == {
            **{"prompts": 1, "answers": 1, "failures": 0, "cost": 1.0, "graded": 0}
        }
        assert totals.models["b"]["cost"] == 8 and "a" not in totals.models
        for model in "ab":
            ledger.grades.grade(row, True, model)
        assert ledger.report().exploration["graded"] == 1


def test_a_prompts_answers_are_graded_wherever_it_was_asked() -> None:
    with Ledger(None, prompts=True) as ledger:
        explored(ledger, "p")
        answered(ledger, "p", "a")
        assert ledger.grades.grade_prompt("p", "a", True) == 2
        assert ledger.grades.grade_prompt("p", "b", True) == 1
        assert ledger.grades.grade_prompt("p", "c", True) == 0
        assert ledger.grades.grade_prompt("another", "a", True) == 0
        assert [answer.right for answer in ledger.grades.answers()] == [1.0, 1.0]
        explored(ledger, "q")
        left = ledger.grades.answers(graded=False)
        assert [(answer.model, answer.answer) for answer in left] == [("b", "four"), ("a", "4")]
        assert left[0].as_dict()["id"] == 3


@pytest.mark.parametrize("right", [1.5, -0.1, float("nan"), "yes", None, [1]])
def test_what_is_no_grade_is_refused(right: Any) -> None:
    with Ledger(None) as ledger:
        row = answered(ledger, "p")
        with pytest.raises(InvalidInput, match="a grade is"):
            ledger.grades.grade(row, right)


def test_a_grade_needs_an_answer() -> None:
    with Ledger(None) as ledger:
        row = answered(ledger, "p")
        with pytest.raises(InvalidInput, match="no decision 99"):
            ledger.grades.grade(99, True)
        with pytest.raises(InvalidInput, match="no answer of 'a'.*there are b"):
            ledger.grades.grade(row, True, "a")
        chosen, _ = ledger.record("p", None, Decision("b", 0.5, 0.1, "r", "b"), 1.0, 0.0)
        with pytest.raises(InvalidInput, match="no answer of 'b'"):
            ledger.grades.grade(chosen, True)


def test_a_draw_is_the_same_for_one_prompt_and_random_over_prompts(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        draws = [ledger.draw(f"prompt {i}") for i in range(400)]
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        assert [ledger.draw(f"prompt {i}") for i in range(400)] == draws
    # Of 400 fair draws below .3, 3.5 standard deviations either way.
    assert 0.22 < sum(draw < 0.3 for draw in draws) / 400 < 0.38


def test_a_ledger_of_the_first_schema_gains_what_it_lacks(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with Ledger(path, prompts=True) as ledger:
        row = answered(ledger, "p")
    base = sqlite3.connect(path)
    for statement in ("TABLE answers", "TABLE explorations", "INDEX decisions_by_hash"):
        base.execute(f"DROP {statement}")
    base.execute("PRAGMA user_version = 1")
    base.commit()
    base.close()
    with Ledger(path) as ledger:
        assert ledger.report().decisions == 1 and ledger.report().graded == 0
        ledger.grades.grade(row, True)
    with Ledger(path) as ledger:
        assert ledger.report().graded == 1


def test_opening_a_ledger_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with Ledger(path) as ledger:
        answered(ledger, "p")
    before = path.read_bytes()
    with Ledger(path) as ledger:
        ledger.report()
        assert path.with_name("ledger.sqlite-wal").stat().st_size == 0
    assert path.read_bytes() == before
