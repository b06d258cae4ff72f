"""What Pliant 0.1.0 saved still loads and gives the same numbers: adapters, routers, runs.

Losses and scores may differ by the order in which another machine adds up float32 numbers.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM

import pliant
from pliant import CPXConfig, CPXTrainer, CPXTrainingConfig, Router, nano
from pliant.adapters import attached
from pliant.adapters.saving import without_retired
from pliant.cli import app
from pliant.complexity import Complexity, attach
from pliant.errors import PliantError
from pliant.gradients import GradientConfig
from pliant.gradients import attach as attach_gradients
from pliant.routing import scorers
from pliant.routing.outcomes import Outcomes
from pliant.training import restore_adapters

OLD = Path(__file__).parent / "fixtures" / "v0_1"
EXPECTED: dict[str, Any] = json.loads((OLD / "expected.json").read_text())
KINDS = ("cpx", "group", "length", "probe")
DROPPED, REPLACED = ("pair", "tfidf-logistic"), ("knn", "tfidf")
DIGITS = 1e-4  # a unit in the last printed digit of a loss


def near(expected: Any, rel: float = 1e-4) -> Any:
    """Twelve steps of an optimizer multiply a rounding error of 1e-7 by some hundreds at most."""
    return pytest.approx(expected, rel=rel, abs=1e-6)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the old files, which is the working folder, too."""
    shutil.copytree(OLD, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    return tmp_path / "old"


def test_a_scorer_gives_its_old_scores() -> None:
    model, tokenizer = pliant.load("nano-s")
    scorer = Complexity.from_pretrained(model, OLD / "scorer", tokenizer=tokenizer)
    assert scores_of(scorer) == near(EXPECTED["scorer"]["scores"])


@pytest.mark.parametrize("named", [True, False], ids=["by name", "the last one"])
def test_a_scorers_training_is_resumed(folder: Path, named: bool) -> None:
    """The checkpoint of 0.1.0 holds the scorer itself where now an `adapters` folder lies."""
    model, tokenizer = pliant.load("nano-s")
    config = CPXTrainingConfig(num_epochs=2, batch_size=8, output_dir="scorer-run", seed=3)
    arguments = config.training_arguments(
        use_cpu=True, disable_tqdm=True, logging_steps=1, save_strategy="no"
    )
    scorer = attach(model, CPXConfig(rows=2, lora_rank=0, aggregation="mean"), tokenizer)
    trainer = CPXTrainer(scorer, arguments, config=config, train_dataset=labelled_questions())
    trainer.train(resume_from_checkpoint="scorer-run/checkpoint-5" if named else True)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses == near(EXPECTED["scorer"]["losses"])
    assert scores_of(scorer) == near(EXPECTED["scorer"]["scores"])


def test_a_selective_run_is_resumed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = EXPECTED["lm"]
    assert app.outcome([*expected["arguments"], "--resume"]) == 0
    printed = capsys.readouterr().err.splitlines()
    lines = [line for line in printed if line.startswith("training, step ")]
    assert losses_of(lines) == pytest.approx(losses_of(expected["lines"][4:]), abs=DIGITS)
    weights = safetensors.torch.load_file("lm-run/model.safetensors")
    sums = {name: tensor.double().abs().sum().item() for name, tensor in weights.items()}
    assert sums == near(expected["weights"])


def test_a_selective_adapter_goes_on_where_it_stood() -> None:
    checkpoint = OLD / "lm-run" / "checkpoint-4"
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    saved = json.loads((checkpoint / "adapters" / "gradients" / "pliant.json").read_text())
    config = without_retired(GradientConfig, saved["config"])  # it has a setting that is gone
    gradients = attach_gradients(model, GradientConfig(**config))
    restore_adapters(model, checkpoint)
    assert gradients.state_dict()["_extra_state"] == saved["state"]["_extra_state"]
    assert list(attached(model)) == ["gradients"]


@pytest.fixture
def router(folder: Path) -> Path:
    """The old router with the old probe: its own scorer is a `text` of then, which is gone."""
    shutil.copytree("scorers/probe", "router/scorer", dirs_exist_ok=True)
    file = folder / "router" / "router.json"
    content = json.loads(file.read_text())
    content["scorer"]["kind"] = "probe"
    file.write_text(json.dumps(content))
    return folder / "router"


def test_a_router_makes_its_old_choices(router: Path) -> None:
    threshold = json.loads((router / "router.json").read_text())["threshold"]["value"]
    with Router.load(router, ledger=None) as opened:
        decisions = [opened.choose(prompt) for prompt in prompts()]
    gains = [gain for _, gain in EXPECTED["scorers"]["probe"]]
    assert [decision.gain for decision in decisions] == near(gains)
    chosen = [decision.model for decision in decisions]
    assert chosen == ["nano-l" if gain > threshold else "nano-s" for gain in gains]
    assert len(set(chosen)) == 2


def test_a_router_is_evaluated_on_old_labels(
    router: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--router", str(router), "--labels", "labels.jsonl", "--json"]
    assert app.outcome(["route", "evaluate", *words]) == 0
    printed = json.loads(capsys.readouterr().out)
    labels = Outcomes.read("labels.jsonl")
    predictions = scorers.load(router / "scorer").predict(labels.prompts)
    assert predictions.novel is not None
    large = (predictions.last_gain > printed["threshold"]) | predictions.novel
    assert printed["routed"]["shares"]["nano-l"] == near(large.mean())
    assert printed["routed"]["quality"]["value"] == near(
        np.where(large, labels.strong, labels.weak).mean()
    )
    assert printed["routed"]["cost"]["value"] == near(
        np.where(large, labels.cost[:, 1], labels.cost[:, 0]).mean()
    )


def test_a_router_whose_scorer_was_replaced_asks_to_be_fitted_again() -> None:
    with pytest.raises(PliantError, match="text scorer of an older Pliant, .*: fit again"):
        Router.load(OLD / "router", ledger=None)


@pytest.mark.usefixtures("router")
def test_a_ledger_is_read_and_written_on() -> None:
    with Router.load("router") as router:
        before = router.report()
        for name in ("decisions", "answered", "models", "cost"):
            assert before[name] == EXPECTED["ledger"][name], name
        router.ask(prompts()[0], session="s")
        assert router.report()["decisions"] == before["decisions"] + 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_routers_scorer_predicts_its_old_gains(kind: str) -> None:
    scorer = scorers.load(OLD / "scorers" / kind)
    gains = scorer.predict(prompts(), ["sum"] * len(prompts())).gain
    assert gains == near(np.array(EXPECTED["scorers"][kind]))


@pytest.mark.parametrize("kind", [*DROPPED, *REPLACED])
def test_a_scorer_that_is_no_longer_made_asks_to_be_fitted_again(kind: str) -> None:
    words = "fit the router again with 'text'" if kind in DROPPED else "of an older Pliant: fit the"
    with pytest.raises(PliantError, match=words):
        scorers.load(OLD / "scorers" / kind)


def test_every_old_scorer_is_tested() -> None:
    assert {*KINDS, *DROPPED, *REPLACED} == {path.name for path in (OLD / "scorers").iterdir()}


def prompts() -> list[str]:
    return [question.prompt for question in nano.questions("test", 8, seed=4)]


def labelled_questions() -> list[dict[str, Any]]:
    return [
        {"prompt": question.prompt, "label": float(len(question.prompt) % 3 == 0)}
        for question in nano.questions("train", 48, seed=1)
    ]


def scores_of(scorer: Complexity) -> list[float]:
    return torch.as_tensor(scorer.score(prompts()).score).tolist()


def losses_of(lines: list[str]) -> list[float]:
    return [float(loss) for line in lines for loss in re.findall(r"loss ([\d.]+)", line)]
