"""`pliant route ask`: the answer, one line of decision and cost, and what can go wrong."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from tests.routing.chat_server import chat_server
from tests.routing.minimal_scorer import content

from pliant.cli import app
from pliant.routing import Outcomes, scorers
from pliant.routing.router import Router
from pliant.routing.router_file import RouterFile, make


def saved(folder: Path, file: RouterFile) -> str:
    """A router that sends prompts of more than thirty letters or so to the second model."""
    prompts = tuple("x" * n for n in range(2, 62))
    right = [[float(len(p) < 30), 1.0] for p in prompts]
    outcomes = Outcomes(prompts, file.names, right, [[1.0, 5.0]] * len(prompts))
    Router(file, scorers.make("length").fit(outcomes, None, 0)).save(folder)
    return str(folder)


@pytest.fixture
def nano_router(tmp_path: Path) -> str:
    return saved(tmp_path / "router", make(**content(scorer={"kind": "length"})))


def ask(router: str, *words: str) -> int:
    return app.outcome(["route", "ask", "--router", router, *words])


def test_the_answer_comes_first_and_then_one_line(
    nano_router: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask(nano_router, "2+2", "--max-new-tokens", "8") == 0
    printed, complained = capsys.readouterr()
    answer, line = printed.splitlines()
    assert answer.strip()
    assert line.startswith("nano-s | expected gain") and "cost 1 call | saved 4 calls" in line
    assert complained == ""


def test_machines_get_one_document_and_the_ledger_a_row(
    nano_router: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask(nano_router, "x" * 60, "--max-new-tokens", "8", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"] == found["decision"]["model"] == "nano-l"
    assert found["cost"] == 5 and found["saved"] == 0
    assert Router.load(nano_router).report()["answered"] == 1


def test_a_prompt_can_come_from_stdin(
    nano_router: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for words in ([], ["-"]):
        monkeypatch.setattr("sys.stdin", io.StringIO("x" * 60 + "\n"))
        assert ask(nano_router, *words, "--choose", "--json") == 0
        assert json.loads(capsys.readouterr().out)["model"] == "nano-l"
    monkeypatch.setattr("sys.stdin", io.StringIO('[{"role": "user", "content": "2+2"}]'))
    assert ask(nano_router, "--messages", "--choose") == 0
    assert capsys.readouterr().out.startswith("nano-s | ")


def test_choosing_asks_nobody(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with chat_server() as server:
        models = [
            {"name": name, "backend": f"{name}=openai:m@{server.url}", "cost": cost}
            for name, cost in (("weak", 1.0), ("strong", 5.0))
        ]
        file = make(**content(models=models, default="strong", scorer={"kind": "length"}))
        router = saved(tmp_path / "router", file)
        assert ask(router, "hello", "--choose") == 0
        assert server.bodies == []
        assert ask(router, "hello") == 0
        assert "HELLO" in capsys.readouterr().out and len(server.bodies) == 1


def test_a_ledger_elsewhere_or_none(nano_router: str, tmp_path: Path) -> None:
    other = tmp_path / "other.sqlite"
    assert ask(nano_router, "2+2", "--choose", "--ledger", str(other)) == 0
    assert ask(nano_router, "2+2", "--choose", "--ledger", "none") == 0
    assert other.exists() and not (Path(nano_router) / "ledger.sqlite").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["2+2", "--samples", "3"], "temperature"),
        (["x" * 3000], "no model takes this prompt"),
        (["not json", "--messages"], "list of messages"),
        (['{"role": "user"}', "--messages"], "list of messages"),
        (['[{"role": "user"}]', "--messages"], "a role and a content"),
    ],
)
def test_what_cannot_be_asked_is_one_line_and_exit_code_two(
    words: list[str], said: str, nano_router: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask(nano_router, *words) == 2
    printed, complained = capsys.readouterr()
    assert printed == "" and complained.count("\n") == 1 and said in complained


def test_a_folder_that_is_no_router_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask(str(tmp_path), "2+2") == 2
    assert f"{tmp_path}: holds no router.json" in capsys.readouterr().err
