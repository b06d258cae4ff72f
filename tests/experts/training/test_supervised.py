"""trl's ordinary SFT and DPO trainers train an expert like any other method of PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.experts.training.runs import model, tokenizer, z_of
from tests.gradients.test_trl import options

from pliant.experts import SVFConfig

trl = pytest.importorskip("trl", minversion="1.16")

PAIRS = [
    {"prompt": "2 + 3 =", "completion": " 5"},
    {"prompt": "a b", "completion": " c d e"},
    {"prompt": "one", "completion": " two"},
    {"prompt": "x", "completion": " y z"},
]


def of(kind: str, folder: Path, base: Any) -> Any:
    from datasets import Dataset

    how = {**options(folder), "max_steps": 6, "optim": "adamw_torch", "learning_rate": 0.05}
    rows: list[dict[str, str]] = PAIRS
    if kind == "DPO":
        rows = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": "?!"} for r in PAIRS]
    return getattr(trl, f"{kind}Trainer")(
        base,
        args=getattr(trl, f"{kind}Config")(**how),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        peft_config=SVFConfig(),
    )


@pytest.mark.parametrize("kind", ["SFT", "DPO"])
def test_only_z_moves_and_the_loss_falls(tmp_path: Path, kind: str) -> None:
    base = model()
    before = {name: p.clone() for name, p in base.named_parameters()}
    run = of(kind, tmp_path, base)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < 0.97 * losses[0]
    assert all(bool(d.any()) for d in z_of(run.model).values())
    run.model.unload()
    assert all(torch.equal(p, before[name]) for name, p in base.named_parameters())
    assert getattr(run, "ref_model", None) is None
