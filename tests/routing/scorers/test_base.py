"""The base of scorers that read a model: shared, framed as it is asked, and what reading costs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.routing.labels import outcomes

from pliant import nano
from pliant.complexity import CPXConfig, attach
from pliant.routing.fitting.calibrate import calibrate
from pliant.routing.fitting.evaluate import evaluate
from pliant.routing.fitting.fit import fit
from pliant.routing.outcomes import Outcomes
from pliant.routing.scorers import make
from pliant.routing.scorers.base import Base
from pliant.routing.scorers.cpx import Capacity


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


def conversations(n: int, seed: int) -> Outcomes:
    """Each prompt as what a user asks second; the text is what a table of labels names it."""
    plain = outcomes(n, seed)
    first = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    talks = tuple([*first, {"role": "user", "content": text}] for text in plain.prompts)
    texts = tuple(f"user: hi\nassistant: hello\nuser: {text}" for text in plain.prompts)
    return replace(plain, prompts=texts, messages=talks)


@pytest.fixture
def framed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """All prompts that a model is read with."""
    read: list[Any] = []
    before = Base.framed

    def noting(self: Base, prompts: Any) -> list[Any]:
        read.extend(prompts)
        return before(self, prompts)

    monkeypatch.setattr(Base, "framed", noting)
    return read


@pytest.mark.parametrize("kind", ["cpx", "probe", "cpx+text"])
def test_a_model_reads_a_conversation_as_it_will_be_asked_it(kind: str, framed: list[Any]) -> None:
    few = {"capacities": [Capacity(1, 0), Capacity(1, 1)], "epochs": 1}
    labels = conversations(40, 1), conversations(20, 2)
    make(kind, base="nano-s", **few if "cpx" in kind else {}).fit(*labels)
    talks = [talk for part in labels for talk in part.asked]
    assert framed and all(prompt in talks for prompt in framed)


def test_so_it_is_where_a_router_is_fitted_measured_and_calibrated(
    framed: list[Any], tmp_path: Path
) -> None:
    backends = {"model-0": "nano-s", "model-1": "nano-l"}
    folder = tmp_path / "router"
    labels = replace(conversations(200, 1), unit="flops")
    fit(labels, folder, scorers=["probe"], base="nano-s", backends=backends)
    evaluate(folder, conversations(60, 2))
    calibrate(folder, replace(conversations(60, 3), unit="flops"), "30 % of calls")
    assert len(framed) > 320 and not any(isinstance(prompt, str) for prompt in framed)
