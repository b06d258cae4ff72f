"""The base of scorers that read a model: shared, framed as it is asked, and what reading costs."""

from __future__ import annotations

import pytest

from pliant import nano
from pliant.complexity import CPXConfig, attach
from pliant.routing.scorers import make
from pliant.routing.scorers.base import Base


def test_reading_costs_two_operations_for_each_parameter_and_token() -> None:
    base = Base("nano-s")
    parameters = nano.load("nano-s")[0].num_parameters()
    tokens = [len("12+34") + 2, len("1+1") + 2]  # bytes, and one token a role
    assert base.reading_flops(["12+34", "1+1"]) == 2 * parameters * sum(tokens) / 2
    scorer = attach(base.model, CPXConfig(), base.tokenizer, name="beside")
    assert base.reading_flops(["12+34"]) == 2 * parameters * tokens[0]
    scorer.detach()


@pytest.mark.parametrize("kind", ["cpx", "probe", "cpx+text"])
def test_scorers_that_read_it_cost_that_and_text_costs_nothing(kind: str) -> None:
    expected = Base("nano-s").reading_flops(["12+34"])
    assert make(kind, base="nano-s").flops(["12+34"]) == expected > 0
    assert make("text").flops(["12+34"]) == 0
