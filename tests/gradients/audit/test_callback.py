"""Under a Trainer: measured once, at the start, and then trained as was found best."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.gradients.audit.conftest import rows_like
from transformers import Trainer, TrainingArguments

import pliant.gradients.audit.callback as module
from pliant.data.collate import Collator
from pliant.errors import InvalidInput
from pliant.gradients import GradientConfig
from pliant.gradients.audit import AuditCallback
from pliant.gradients.audit.contenders import STANDARD, Contender
from pliant.gradients.model import OFF
from pliant.gradients.training import make_selective

ROWS, padded = rows_like(40), Collator()
real_padded = padded


def trainer(model: Any, folder: Path, **settings: Any) -> Trainer:
    args = TrainingArguments(
        str(folder),
        **{
            "per_device_train_batch_size": 4,
            "max_steps": 4,
            "save_steps": 2,
            "logging_steps": 1,
            "learning_rate": 1e-2,
            "report_to": "none",
            "disable_tqdm": True,
            **settings,
        },
    )
    return Trainer(model, args, train_dataset=ROWS, data_collator=padded)


def drawing(rows: Any) -> Any:
    """A collator that leaves out a label at random, by each of the ways to draw."""
    batch = real_padded(rows)
    drawn = int(torch.randint(24, ())) + random.randrange(24) + int(np.random.randint(24))
    batch["labels"][:, drawn % 24] = -100
    return batch


def audited(model: Any, folder: Path, **options: Any) -> tuple[Trainer, AuditCallback, list[str]]:
    said: list[str] = []
    callback = AuditCallback(
        steps=1, seeds=2, batches=1, draws=2, turns=1, say=said.append, **options
    )
    run = trainer(model, folder)
    run.add_callback(callback)
    return run, callback, said


def test_it_measures_and_says_and_changes_nothing(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = copy.deepcopy(model)
    monkeypatch.setattr(f"{__name__}.padded", drawing)  # its draws must not be felt afterwards
    run, callback, said = audited(model, tmp_path / "audited")
    make_selective(run, GradientConfig(dense_first=1))
    run.train()
    assert callback.audit is not None and callback.race is not None
    assert said == [callback.audit.sentence, callback.race.sentence]
    unaudited = trainer(plain, tmp_path / "plain")
    make_selective(unaudited, GradientConfig(dense_first=1))
    unaudited.train()
    losses = [
        [entry["loss"] for entry in one.state.log_history if "loss" in entry]
        for one in (run, unaudited)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 4


@pytest.mark.parametrize(
    ("winner", "acting", "word"),
    [
        (STANDARD, OFF, "switched off"),
        (Contender("rows", share=0.5), OFF, "random sequences"),
        (Contender("tokens", GradientConfig(selection="uniform")), None, "uniform"),
        (Contender("tokens", GradientConfig()), "as asked", "as it was set"),
    ],
)
def test_auto_switches_to_the_winner_and_says_so(
    model: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    winner: Contender,
    acting: Any,
    word: str,
) -> None:
    monkeypatch.setattr(module, "race", lambda *a, **k: Declared(winner))
    monkeypatch.setattr(module, "audit", lambda *a, **k: Said())
    asked = GradientConfig(dense_first=1)
    run, _, said = audited(model, tmp_path, auto=True)
    gradients = make_selective(run, asked)
    run.train()
    assert word in said[-1]
    expected = {"as asked": asked, None: winner.config}.get(acting, acting)
    assert gradients.acting == expected and gradients.config == asked
    if winner == STANDARD:
        assert gradients.metrics()["ratio"] == 1
        resumed_keeps_the_verdict(model, tmp_path, asked)


def resumed_keeps_the_verdict(model: Any, folder: Path, asked: GradientConfig) -> None:
    run, callback, said = audited(model, folder, auto=True)
    gradients = make_selective(run, asked)
    gradients.switch(asked)
    run.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert gradients.acting == OFF and callback.race is None and said == []


class Said:
    sentence = "measured"


class Declared:
    """A race that is over."""

    def __init__(self, winner: Contender) -> None:
        asked = type("Run", (), {"contender": Contender("tokens", GradientConfig())})
        self.runs, self.sentence = [asked], "raced"
        self.winner = type("Run", (), {"contender": winner})


def test_a_stream_and_a_lack_of_rows_are_named(model: Any, tmp_path: Path) -> None:
    run, _, _ = audited(model, tmp_path)
    run.train_dataset = ROWS[:3]
    with pytest.raises(InvalidInput, match="3 rows"):
        run.train()
    with pytest.raises(InvalidInput, match="streams"):
        module._rows_of(type("Loader", (), {"dataset": iter(ROWS)}), 0)


def test_auto_without_anything_attached_is_refused(model: Any, tmp_path: Path) -> None:
    run, _, _ = audited(model, tmp_path, auto=True)
    with pytest.raises(InvalidInput, match="make_selective"):
        run.train()
