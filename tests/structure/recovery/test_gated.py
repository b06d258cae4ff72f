"""The gated model learns from itself: its teacher is the same weights with the gates at 1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.structure.models import logits
from tests.structure.recovery.test_training import SETTINGS, TEXTS, TOKENIZER
from transformers import AutoModelForCausalLM

from pliant import nano
from pliant.errors import InvalidInput
from pliant.loading import load
from pliant.structure import (
    PruneConfig,
    Pruned,
    RecoveryConfig,
    RecoveryResult,
    calibration_batches,
    prune,
    recover_gated,
)
from pliant.structure.recovery.gated import whole

BATCHES = calibration_batches(nano.conversations("train", 100), TOKENIZER, tokens=1000, length=64)


def half() -> tuple[Any, Pruned]:
    """nano-s without half of its channels."""
    model, _ = load("nano-s")
    return model, prune(model, BATCHES, PruneConfig(channels=0.5, score="activation"))


def recovered(pruned: Pruned, folder: Path, train: Any, **options: Any) -> RecoveryResult:
    settings = {**SETTINGS, **options.pop("settings", {})}
    config = RecoveryConfig(train, rank=4, distill=options.pop("distill", 0.5))
    options = {"settings": settings, "say": lambda line: None, **options}
    return recover_gated(pruned, TOKENIZER, TEXTS, folder, config, **options)


@pytest.mark.parametrize("train", ["lora", "norms"])
def test_a_small_set_is_trained_and_a_smaller_stock_model_comes_out(
    train: str, tmp_path: Path
) -> None:
    model, pruned = half()
    before = logits(model)
    result = recovered(pruned, tmp_path / "out", train, settings={"max_steps": "12"})
    assert result.teacher is not None and result.teacher < result.after < result.before
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert again.config.intermediate_size == model.config.intermediate_size // 2
    assert torch.allclose(logits(again), logits(model), atol=1e-4)
    assert not torch.allclose(logits(model), before, atol=1e-2)


@pytest.mark.parametrize("train", ["lora", "norms"])
def test_the_teacher_stays_the_whole_model(
    train: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After every step its predictions are those of the model before pruning, bit for bit."""
    from pliant.structure.recovery.trainer import RecoveryTrainer

    expected = load("nano-s")[0].eval()
    seen: list[bool] = []
    compute = RecoveryTrainer.compute_loss

    def spy(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        own = {k: v for k, v in inputs.items() if k != "labels"}
        with torch.no_grad():
            seen.append(torch.equal(self.teacher(own), expected(**own, use_cache=False).logits))
        return compute(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(RecoveryTrainer, "compute_loss", spy)
    _, pruned = half()
    recovered(pruned, tmp_path / "out", train)
    assert len(seen) == 4 and all(seen)


def test_the_model_is_whole_inside_the_block_alone() -> None:
    model, pruned = half()
    gated = logits(model)
    with whole(pruned):
        assert torch.equal(logits(model), logits(load("nano-s")[0]))
    assert torch.equal(logits(model), gated)


@pytest.mark.parametrize("train", ["lora", "norms"])
def test_a_run_resumes_and_ends_as_one_that_was_not_interrupted(train: str, tmp_path: Path) -> None:
    _, pruned = half()
    expected = recovered(pruned, tmp_path / "once", train)
    _, pruned = half()

    def die(line: str) -> None:
        if line.startswith("training, step 3"):
            raise KeyboardInterrupt  # between the checkpoints 2 and 4

    with pytest.raises(KeyboardInterrupt):
        recovered(pruned, tmp_path / "twice", train, say=die)
    _, pruned = half()
    again = recovered(pruned, tmp_path / "twice", train, resume=True)
    assert again.resumed_at == 2 and again.after == pytest.approx(expected.after, abs=1e-6)
    assert again.before == expected.before


def test_all_weights_cannot_be_trained_in_place_of_their_teacher(tmp_path: Path) -> None:
    _, pruned = half()
    with pytest.raises(InvalidInput, match="the teacher is the same weights"):
        recovered(pruned, tmp_path / "out", "all")
    assert not (tmp_path / "out").exists()
