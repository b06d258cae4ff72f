"""Exploring: some novel prompts are asked of every model, which the reply does not show."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.routing.chat_server import ChatServer, chat_server
from tests.routing.minimal_scorer import Letters, content

from pliant.errors import InvalidInput
from pliant.routing.live.exploring import GradeWarning
from pliant.routing.live.ledger import Ledger
from pliant.routing.router import Router
from pliant.routing.router_file import make
from pliant.verify import verifier

NOVEL, FAMILIAR = "да", "2+2"
COSTS = {"weak": 1.0, "middle": 2.0, "strong": 5.0}


@contextmanager
def exploring(*scripts: list[Any], share: float = 1.0, **options: Any) -> Iterator[Any]:
    """A router over as many servers as there are scripts, and the servers, the strongest last."""
    names = [*list(COSTS)[: len(scripts) - 1], "strong"]
    with chat_server(scripts[0]) as first, chat_server(scripts[-1]) as last:
        servers: list[ChatServer] = [first] * (len(scripts) - 1) + [last]
        models = [
            {"name": name, "backend": f"{name}=openai:m@{server.url}", "cost": COSTS[name]}
            for name, server in zip(names, servers, strict=True)
        ]
        worth = {"on": "worth", "value": 0.1, "sentence": "s"}
        changes = {"threshold": worth} if len(names) > 2 else {}
        file = make(
            **content(
                **{"models": models, "default": "strong", "explore": {"share": share}, **changes},
                ledger={"prompts": True},
            )
        )
        with Router(file, Letters(len(names)), **options) as router:
            yield router, servers


def test_a_novel_prompt_is_asked_of_every_model_and_the_default_answers() -> None:
    with exploring([], []) as (router, (weak, strong)):
        reply = router.ask(NOVEL, group="russian")
        assert (reply.model, reply.text, reply.cost) == ("strong", "ДА", 5.0)
        assert reply.explored == ("weak",) and len(weak.bodies) == len(strong.bodies) == 1
        report = router.report()
        assert (report["cost"], report["saved"], report["answered"]) == (6.0, -1.0, 1)
        assert report["exploration"]["prompts"] == 1
        assert router.ask(FAMILIAR).explored == () and len(strong.bodies) == 1
        router.choose(NOVEL)
        assert len(weak.bodies) == 2, "choosing asks nobody"
        router.grade(reply, True)
        router.grade(reply, False, "weak")
        (label,) = router.ledger.grades.labelled(["weak", "strong"])
        assert (label.prompt, label.group) == (NOVEL, "russian")
        assert label.right == {"weak": 0.0, "strong": 1.0}
        assert label.cost == {"weak": 1.0, "strong": 5.0}


def test_a_share_of_them_is_explored_and_repeats_behave_alike() -> None:
    with exploring([], [], share=0.5) as (router, (weak, _)):
        prompts = [f"{NOVEL} {i}" for i in range(12)]
        first = [router.ask(prompt).explored for prompt in prompts]
        assert [router.ask(prompt).explored for prompt in prompts] == first
        assert first == [("weak",) if router.ledger.draw(p) < 0.5 else () for p in prompts]
        assert len(weak.bodies) == 2 * first.count(("weak",))


def test_a_model_that_fails_leaves_the_reply_as_it_is() -> None:
    with exploring([500], []) as (router, (weak, _)):
        assert router.ask(NOVEL).explored == ()
        assert router.ask(NOVEL).explored == (), "the model is down, and is left alone"
        assert len(weak.bodies) == 1
        explored = router.report()["exploration"]
        assert (explored["prompts"], explored["failures"], explored["cost"]) == (2, 2, 0)


def test_not_even_a_backend_with_a_bug_fails_the_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    with exploring([], []) as (router, _):
        broken = router._asking.backends["weak"]
        monkeypatch.setattr(broken, "ask", lambda *_: {}["no such key"])
        assert router.ask(NOVEL).text == "ДА"
        assert router.report()["exploration"]["failures"] == 1


def test_three_models_are_asked() -> None:
    with exploring([], [], []) as (router, _):
        reply = router.ask(NOVEL)
        assert reply.model == "strong" and set(reply.explored) == {"weak", "middle"}
        assert router.report()["exploration"]["cost"] == 3.0


def test_what_the_caller_gives_grades_every_answer() -> None:
    with exploring([], []) as (router, _):
        router.ask(NOVEL, verify=lambda answer: float(answer == "ДА"))
        router.ask(FAMILIAR, verify=verifier("exact"), reference="5")
        stored = router.ledger.grades.answers()
        assert [answer.right for answer in stored] == [1.0, 1.0]
        assert router.report()["graded"] == 3
        assert len(router.ledger.grades.labelled(["weak", "strong"])) == 1


def test_a_routers_grader_grades_explored_prompts_alone() -> None:
    seen: list[Any] = []

    def grader(answer: str, reference: Any, prompt: str) -> float:
        seen.append((answer, reference, prompt))
        return 0.5

    with exploring([], [], grader=grader) as (router, _):
        router.ask(FAMILIAR)
        router.ask(NOVEL, reference="yes")
        assert seen == [("ДА", "yes", NOVEL)] * 2
        assert router.report()["exploration"]["graded"] == 1


def test_a_grader_that_fails_is_a_warning() -> None:
    with (
        exploring([], []) as (router, _),
        pytest.warns(GradeWarning, match="not graded .*division"),
    ):
        assert router.ask(NOVEL, verify=lambda answer: 1 / 0).text == "ДА"


def test_a_verifier_that_cannot_be_called_is_refused_before_anything_is_asked() -> None:
    with exploring([], []) as (router, (weak, strong)):
        with pytest.raises(InvalidInput, match="cannot be called with an answer"):
            router.ask(NOVEL, verify=lambda: 1.0)
        assert not weak.bodies and not strong.bodies and router.report()["decisions"] == 0


def test_prompts_that_are_not_stored_cannot_be_learned_from() -> None:
    with pytest.raises(InvalidInput, match="explore: nothing can be learned.*prompts"):
        make(**content(explore={"share": 0.1}))
    with pytest.raises(InvalidInput, match=re.escape("explore.share")):
        make(**content(explore={"share": 1.1}, ledger={"prompts": True}))


def test_exploring_is_off_unless_it_is_asked_for(tmp_path: Path) -> None:
    assert make(**content()).explore.share == 0
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        assert ledger.report().exploration["prompts"] == 0
