"""A language model trained in a folder: what it is resumed as, and which engine a race chose."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from pliant.errors import CorruptFile, InvalidInput
from pliant.gradients import GradientConfig, selective_run
from pliant.gradients.audit.contenders import STANDARD, Contender
from pliant.gradients.model import OFF
from pliant.gradients.selective_run import Plan, SelectiveResult, train_lm
from pliant.loading import load
from pliant.training.texts import Texts

SETTINGS = {"max_steps": "2", "save_steps": "2", "logging_steps": "1", "use_cpu": "true"}


def pieces(*lengths: int) -> Texts:
    rows = [[*range(40, 40 + n)] for n in lengths]
    return Texts([{"input_ids": row, "labels": row} for row in rows])


def trained(
    folder: Path, texts: Texts, config: GradientConfig, *, auto: bool = False, **run: Any
) -> SelectiveResult:
    settings = {**SETTINGS, **run.pop("settings", {})}
    model, tokenizer = load("nano-s")
    config_values = asdict(config)
    plan = Plan("nano-s", "a.txt", texts.digest, config_values, settings, None, "float32", auto)
    run.setdefault("say", lambda line: None)
    return train_lm(model, tokenizer, texts, folder, plan, **run)


def test_a_run_that_ends_between_two_logs_is_counted_to_its_end(tmp_path: Path) -> None:
    settings = {"max_steps": "3", "logging_steps": "2"}
    result = trained(tmp_path / "run", pieces(9), GradientConfig(ratio=0.5), settings=settings)
    assert (result.tokens, result.trained) == (3 * 8, 3 * 4)
    assert result.last_loss == result.last_loss != result.first_loss
    assert str(result) == "3 steps: too few to tell whether the loss fell"


class Declared:
    """A race that is over."""

    def __init__(self, winner: Contender) -> None:
        self.runs = (Declared.Run(Contender("tokens", GradientConfig())),)
        self.winner = Declared.Run(winner)
        self.sentence = f"{winner.name} won"

    class Run:
        def __init__(self, contender: Contender) -> None:
            self.contender = contender


@pytest.mark.parametrize(
    ("winner", "engine"),
    [
        (STANDARD, "standard"),
        (Contender("tokens", GradientConfig(engine="exact", selection="uniform")), "exact"),
    ],
)
def test_a_race_decides_once_and_the_record_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, winner: Contender, engine: str
) -> None:
    import pliant.gradients.audit.callback as audit

    races: list[dict[str, Any]] = []

    def race(*_: Any, **options: Any) -> Declared:
        races.append(options)
        return Declared(winner)

    monkeypatch.setattr(selective_run, "MIN_STEPS", 1)
    monkeypatch.setattr(audit, "race", race)
    lines: list[str] = []
    texts, folder = pieces(*range(8, 20)), tmp_path / "run"
    result = trained(folder, texts, GradientConfig(), auto=True, say=lines.append)
    assert result.engine == engine and f"{winner.name} won" in lines
    assert races[0]["seeds"] == 3 and races[0]["seconds"] == 3.0
    record = json.loads((folder / "pliant-train.json").read_text())
    assert record["choice"]["why"] == f"{winner.name} won" and record["ended"]["engine"] == engine
    (folder / "checkpoint-2" / "complete.json").unlink()  # as if killed before it was complete
    again = trained(folder, texts, GradientConfig(), auto=True, resume=True)
    assert again.engine == engine and len(races) == 1
    assert again.last_loss == result.last_loss


def test_a_short_training_races_nothing_and_says_so(tmp_path: Path) -> None:
    lines: list[str] = []
    auto = trained(tmp_path / "auto", pieces(8, 9), GradientConfig(), auto=True, say=lines.append)
    assert lines[0].startswith("engine auto: every token is trained, because 2 steps are too few")
    usual = trained(tmp_path / "usual", pieces(8, 9), OFF)
    assert (auto.first_loss, auto.last_loss) == (usual.first_loss, usual.last_loss)
    assert auto.engine == "standard" and auto.trained == auto.tokens


def test_a_run_begun_before_the_choice_existed_is_resumed_as_it_began(tmp_path: Path) -> None:
    before = trained(tmp_path, pieces(8, 9), GradientConfig())
    path = tmp_path / "pliant-train.json"
    record = json.loads(path.read_text())
    del record["plan"]["auto"]
    path.write_text(json.dumps(record))
    (tmp_path / "checkpoint-2" / "complete.json").unlink()  # as if killed before it was complete
    again = trained(tmp_path, pieces(8, 9), GradientConfig(), auto=True, resume=True)
    assert (again.engine, again.last_loss) == (before.engine, before.last_loss)
    assert again.engine == "sparse"


def test_an_edited_run_is_refused_in_one_line(tmp_path: Path) -> None:
    settings = {"max_steps": "3"}
    trained(tmp_path, pieces(8), GradientConfig(), settings=settings)
    checkpoint = tmp_path / "checkpoint-2"
    (tmp_path / "checkpoint-3").rename(tmp_path / "runs")  # as if killed in the third step
    weights = (checkpoint / "model.safetensors").read_bytes()
    (checkpoint / "model.safetensors").write_bytes(bytes(len(weights)))
    with pytest.raises(CorruptFile, match="checkpoint-2: its state cannot be read"):
        trained(tmp_path, pieces(8), GradientConfig(), settings=settings, resume=True)
    (checkpoint / "model.safetensors").write_bytes(weights)
    path = tmp_path / "pliant-train.json"
    record = json.loads(path.read_text())
    for changes, message in (
        ({"plan": {**record["plan"], "config": 3}}, "begun with another config"),
        ({"plan": {**record["plan"], "auto": True}, "choice": 3}, "choice is damaged"),
    ):
        path.write_text(json.dumps(record | changes))
        auto = "choice" in changes
        if auto:  # a choice is read where a run begins
            shutil.rmtree(checkpoint)
        with pytest.raises(InvalidInput, match=message):
            trained(
                tmp_path, pieces(8), GradientConfig(), settings=settings, auto=auto, resume=True
            )
