"""The base model of a scorer: shared, read in its chat format, and the cost of reading."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.routing.labels import outcomes

from pliant import nano
from pliant.complexity import CPXConfig, attach
from pliant.complexity.training import run as training
from pliant.errors import WrongBase
from pliant.routing.fitting.calibrating import calibrate
from pliant.routing.fitting.evaluate import evaluate
from pliant.routing.fitting.fit import fit
from pliant.routing.outcomes import Outcomes
from pliant.routing.scorers import load, make
from pliant.routing.scorers.base_model import BaseLM, Probe, States
from pliant.routing.scorers.cpx import Capacity, Cpx, by_the_best_elsewhere
from pliant.routing.scorers.linear import folds, gain_error, joined
from pliant.routing.scorers.protocol import gains


def test_reading_costs_two_operations_for_each_parameter_and_token() -> None:
    base = BaseLM("nano-s")
    parameters = nano.load("nano-s")[0].num_parameters()
    tokens = [len("12+34") + 2, len("1+1") + 2]  # bytes, and one token a role
    assert base.reading_flops(["12+34", "1+1"]) == 2 * parameters * sum(tokens) / 2
    scorer = attach(base.model, CPXConfig(), base.tokenizer, name="beside")
    assert base.reading_flops(["12+34"]) == 2 * parameters * tokens[0]
    scorer.detach()


@pytest.mark.parametrize("kind", ["cpx", "probe"])
def test_scorers_that_read_it_cost_that_and_text_costs_nothing(kind: str) -> None:
    expected = BaseLM("nano-s").reading_flops(["12+34"])
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
def read_prompts(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """All prompts that a base model reads."""
    read: list[Any] = []
    before = BaseLM.chat_format

    def noting(self: BaseLM, prompts: Any) -> list[Any]:
        read.extend(prompts)
        return before(self, prompts)

    monkeypatch.setattr(BaseLM, "chat_format", noting)
    return read


@pytest.mark.parametrize("kind", ["cpx", "probe"])
def test_a_model_reads_a_conversation_as_it_will_be_asked_it(
    kind: str, read_prompts: list[Any]
) -> None:
    few = {"capacities": [Capacity(1, 0), Capacity(1, 1)], "epochs": 1}
    labels = conversations(40, 1), conversations(20, 2)
    make(kind, base="nano-s", **few if "cpx" in kind else {}).fit(*labels)
    talks = [talk for part in labels for talk in part.asked]
    assert read_prompts and all(prompt in talks for prompt in read_prompts)


def test_so_it_is_where_a_router_is_fitted_measured_and_calibrated(
    read_prompts: list[Any], tmp_path: Path
) -> None:
    backends = {"model-0": "nano-s", "model-1": "nano-l"}
    folder = tmp_path / "router"
    labels = replace(conversations(200, 1), unit="flops")
    fit(labels, folder, scorers=["probe"], base="nano-s", backends=backends, force=True)
    evaluate(folder, replace(conversations(60, 2), unit="flops"))
    labels = replace(conversations(60, 3), unit="flops")
    calibrate(folder, labels, "30 % of calls")
    assert len(read_prompts) > 320
    assert not any(isinstance(prompt, str) for prompt in read_prompts)


def test_a_probe_refuses_another_base_than_its_own(tmp_path: Path) -> None:
    make("probe", base="nano-s").fit(outcomes(40, 1)).save(tmp_path)
    again = load(tmp_path)
    assert again.predict(["1+1"]).gain.shape == (1, 2)
    again = load(tmp_path)
    assert isinstance(again, Probe)
    again._base = "nano-l"  # as if what a folder holds had been replaced
    with pytest.raises(WrongBase, match="nano-l: the probe was fitted on another base .nano-s"):
        again.predict(["1+1"])


def test_a_probe_reads_each_prompt_once_for_all_layers_and_fits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read: list[tuple[int, tuple[int, ...]]] = []
    before = States.compute

    def noting(self: States, prompts: Any, layers: Any) -> Any:
        read.append((len(prompts), tuple(layers)))
        return before(self, prompts, layers)

    monkeypatch.setattr(States, "compute", noting)
    labels, scorer = outcomes(60, 1), make("probe", base="nano-s")
    predictions = scorer.cross_validate(labels, [folds(labels, 3, seed) for seed in range(2)])
    predictions.check(labels, "probe")
    scorer.fit(labels)
    assert read == [(len(set(labels.prompts)), (1, 2, 3))]


def test_a_probe_penalises_as_much_as_labels_without_a_pattern_need() -> None:
    labels, scorer = outcomes(90, 1), make("probe", base="nano-s")
    coins = (np.random.default_rng(0).random(labels.right.shape) < 0.5).astype(float)
    scorer.cross_validate(replace(labels, right=coins), [folds(labels, 3, 0)])
    assert isinstance(scorer, Probe) and scorer.candidate is not None
    assert scorer.candidate.strength <= 1e-2  # a tenth of the least that was tried before


def test_cpx_runs_each_prompt_once_for_all_folds_and_the_fit_after_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run: list[int] = []
    before = training.in_memory

    def noting(prefilled: Any, ids: Any) -> Any:
        run.append(len(ids))
        return before(prefilled, ids)

    monkeypatch.setattr(training, "in_memory", noting)
    labels, more = outcomes(60, 1), outcomes(6, 2)
    partition = folds(labels, 3, 0)
    scorer = make("cpx", base="nano-s", capacities=[Capacity(1, 0), Capacity(1, 1)], epochs=3)
    predictions = scorer.cross_validate(labels, [partition, partition])
    predictions.check(labels, "cpx")
    assert sum(run) == len(set(labels.prompts))
    assert isinstance(scorer, Cpx) and set(scorer.errors) == set(map(str, scorer.capacities))
    scorer.fit(joined([labels, more]))
    assert sum(run) == len({*labels.prompts, *more.prompts})
    alone = make("cpx", base="nano-s", capacities=[scorer.capacity], epochs=3)
    rest = np.setdiff1d(np.arange(len(labels)), partition[1])
    expected = alone.fit(labels.select(rest)).predict(labels.select(partition[1]).asked)
    assert np.allclose(predictions.gain[partition[1]], expected.gain, atol=1e-4)
    assert np.ptp(expected.last_gain) > 0


def test_a_capacity_is_not_chosen_on_the_prompts_that_it_then_predicts() -> None:
    """Of guesses that are equally good, the best on some labels is so by chance."""
    draw, labels = np.random.default_rng(0), outcomes(60, 1)
    differences = []
    for _ in range(60):
        coins = replace(labels, right=draw.integers(0, 2, (60, 2)).astype(float))
        tried = [draw.uniform(0, 1, (60, 2)) for _ in range(4)]
        errors = [gain_error(gains(right), coins) for right in tried]
        chosen = by_the_best_elsewhere(tried, coins, seed=0)
        differences.append((gain_error(gains(chosen), coins), min(errors), np.mean(errors)))
    ours, best, usual = np.mean(differences, axis=0)
    assert best < usual - 0.05 and abs(ours - usual) < 0.02


@pytest.mark.parametrize("kind", ["probe", "embed"])
def test_a_saved_scorer_reads_its_model_on_a_named_device(kind: str, tmp_path: Path) -> None:
    scorer = make(kind, base="nano-s").fit(outcomes(40, 1))
    scorer.save(tmp_path)
    again = load(tmp_path, base=BaseLM("nano-s", "cpu"))
    expected = scorer.predict(["total 1 and 2"]).gain
    assert np.allclose(again.predict(["total 1 and 2"]).gain, expected, atol=1e-5)
