"""The columns of a row besides its tokens (weights, example ids) survive a Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.gradients.test_training import history, padded, rows, trainer
from tests.minimal_adapter import tiny_llama

from pliant.gradients import GradientConfig
from pliant.gradients.training import make_selective

EVERY = GradientConfig(engine="exact", selection="uniform", ratio=1.0)


def marked(some: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A collator that passes these columns on."""
    columns = [key for key in ("loss_weights",) if key in some[0]]
    return padded(some) | {key: torch.tensor([row[key] for row in some]) for key in columns}


def weighed() -> list[dict[str, Any]]:
    return [{**row, "loss_weights": 0.0 if i else 3.0} for i, row in enumerate(rows(2))]


def as_data_set(some: list[dict[str, Any]]) -> Any:
    from datasets import Dataset

    return Dataset.from_list(some)


@pytest.mark.parametrize("kind", [list, as_data_set])
def test_weights_of_rows_reach_the_loss(tmp_path: Path, kind: Any) -> None:
    run = trainer(tiny_llama(), tmp_path, data=kind(weighed()))
    run.data_collator = marked
    make_selective(run, EVERY)
    run.train()
    batch = marked(weighed())
    with torch.no_grad():
        plain = tiny_llama()
        first = {key: batch[key][:1] for key in ("input_ids", "labels", "attention_mask")}
        labelled = [(batch["labels"][i, 1:] != -100).sum() for i in range(2)]
        wanted = 3 * plain(**first).loss * labelled[0] / sum(labelled)
    assert history(run, "loss")[0] == pytest.approx(float(wanted), rel=1e-5)
    assert run.evaluate()["eval_loss"] > 0
