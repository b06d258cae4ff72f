"""What an answer is charged: its own cost, and its scoring unless it went on from that."""

from __future__ import annotations

import pytest
from tests.routing.minimal_scorer import content

from pliant.routing import router_file
from pliant.routing.backends import Answers, Used
from pliant.routing.live.decision import Costing, Decision

FILE = router_file.make(
    **content(
        unit="flops",
        models=[
            {"name": "small", "backend": "nano-s", "cost": 10.0},
            {"name": "large", "backend": "nano-l", "cost": 50.0},
        ],
        scorer={"kind": "length", "cost": 4.0},
        default="large",
    )
)


@pytest.mark.parametrize(("continued", "cost"), [(False, 14.0), (True, 10.0)])
def test_an_answer_that_goes_on_from_its_scoring_pays_it_once(continued: bool, cost: float) -> None:
    decision = Decision(model="small", score=0.1, gain=0.1, reason="", wanted="small")
    answers = Answers(("5",), Used(1, 5, 2, 1.0, 10.0, None), 0)
    reply = Costing(FILE).reply(decision, answers, samples=1, continued=continued)
    assert reply.cost == cost
    assert reply.saved == 50.0 - cost
